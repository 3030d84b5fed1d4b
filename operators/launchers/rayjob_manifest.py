"""A stage that spreads as a RayJob (ray.io/v1): its own process on the head, its workers beside it.

KubeRay makes the Ray cluster, submits the one command of the stage contract to it, and takes the
cluster down in the end. The pod that submits follows the stage's log, so it stands for rank 0.
"""

from __future__ import annotations

import shlex

from operators.launchers.base import StageJob
from operators.launchers.manifests import (
    HOME,
    Manifest,
    Size,
    command_line,
    confined,
    metadata,
    object_name,
    pod_spec,
    pod_template,
    stage_container,
)
from sailyard.cluster import RAYJOB, ClusterSettings
from sailyard.settings import Settings

RAY_VERSION = "2.60.0"
"""Of the image, as constraints.txt has it; KubeRay asks whether it is one that knows tokens."""

OBJECT = "sailyard.dev/object"
"""Label of the pods with the RayJob's name: KubeRay's own differ by the pod's part."""

COMPONENT = "app.kubernetes.io/component"
SUBMITTER, HEAD, WORKER = "ray-submitter", "ray-head", "ray-worker"


def rayjob_name(job: StageJob) -> str:
    """As ``object_name``, but not the same: the Job that KubeRay makes is named like its RayJob.

    At most 47 characters, as KubeRay wants it.
    """
    return "ray-" + object_name(job).removeprefix("sy-")


def rayjob_manifest(
    job: StageJob, size: Size, cluster: ClusterSettings, yard: Settings
) -> Manifest:
    """The RayJob of a stage. Arguments as of ``job_manifest``; `size` is that of the stage alone:
    its devices go to each of the workers, and none to the head.
    """
    name = rayjob_name(job)
    made = metadata(name, job, cluster, queued=True)
    # Pods are not what Kueue admits: their labels are without its queue.
    base = {**made, "labels": {**metadata(name, job, cluster)["labels"], OBJECT: name}}
    workers = cluster.ray_workers
    ray = {"SAILYARD_RAY_ADDRESS": "auto", "SAILYARD_RAY_WORKERS": str(_actors(size, workers))}
    head = stage_container(None, Size(1, 0), cluster, yard, **ray)
    worker = stage_container(None, Size(1, size.gpus_per_node), cluster, yard)
    ray_cluster: Manifest = {
        "rayVersion": RAY_VERSION,
        # Whoever reaches the head could run code on it: let it be asked for a token.
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            # The stage's own process and no worker.
            "rayStartParams": {"num-cpus": "0"},
            "template": pod_template(base, pod_spec(head, cluster), **{COMPONENT: HEAD}),
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": workers,
                "minReplicas": workers,
                "maxReplicas": workers,
                "rayStartParams": {},
                "template": pod_template(base, pod_spec(worker, cluster), **{COMPONENT: WORKER}),
            }
        ],
    }
    submitter = pod_template(base, _submitter(cluster), **{COMPONENT: SUBMITTER})
    spec: Manifest = {
        "entrypoint": shlex.join(command_line(job, Size(1, 0))),
        "submissionMode": "K8sJobMode",
        # Whether it is worth another try is for the launcher to say: KubeRay sees no exit status.
        "backoffLimit": 0,
        "activeDeadlineSeconds": cluster.deadline_seconds,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": cluster.ttl_seconds,
        "suspend": bool(cluster.queue),
        "submitterPodTemplate": submitter,
        "rayClusterSpec": ray_cluster,
    }
    return {"apiVersion": RAYJOB.api_version, "kind": RAYJOB.name, "metadata": made, "spec": spec}


def _actors(size: Size, workers: int) -> int:
    """One for each device; one a pod where there are none."""
    return workers * max(1, size.gpus_per_node)


def _submitter(cluster: ClusterSettings) -> Manifest:
    """A pod that asks the head to run the stage and repeats what it says; it holds no keys."""
    container: Manifest = {
        "name": SUBMITTER,
        "image": cluster.image,
        "imagePullPolicy": cluster.pull_policy,
        "env": [{"name": "HOME", "value": HOME}],
        "resources": {
            "requests": {"cpu": "100m", "memory": "256Mi"},
            "limits": {"memory": "1Gi"},
        },
        "volumeMounts": [
            {"name": "home", "mountPath": HOME},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
        "securityContext": confined(),
    }
    pod = pod_spec(container, cluster)
    pod["volumes"] = [{"name": name, "emptyDir": {}} for name in ("home", "tmp")]
    return pod
