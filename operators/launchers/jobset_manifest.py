"""A stage on several nodes as a JobSet (jobset.x-k8s.io/v1alpha2): its pods start anew together.

Of an Indexed Job the pod that failed is replaced alone, and those that still wait for it fail one
by one. A JobSet deletes them all at the first failure, so they meet again at once, and only one
failure is counted. Its controller makes the headless Service, too.
"""

from __future__ import annotations

from operators.launchers.base import StageJob
from operators.launchers.manifests import (
    Manifest,
    Size,
    command_line,
    metadata,
    object_name,
    pod_spec,
    pod_template,
    stage_container,
)
from sailyard.cluster import JOBSET, ClusterSettings
from sailyard.settings import Settings

# The controller wants names of at most 63 characters: <ours>-pod-0-<index>-<5 of its own>.
PODS = "pod"

JOBSET_NAME = "jobset.sigs.k8s.io/jobset-name"
"""Label of a pod with its JobSet's name."""


def jobset_manifest(
    job: StageJob, size: Size, cluster: ClusterSettings, yard: Settings
) -> Manifest:
    """The JobSet of a stage: one Indexed Job, one pod a node. Arguments as of ``job_manifest``."""
    name = object_name(job)
    command = command_line(job, size, f"{name}-{PODS}-0-0.{name}")
    container = stage_container(command, size, cluster, yard)
    pod = pod_spec(container, cluster, ends_itself=True)
    made = metadata(name, job, cluster, queued=True)
    labels = {**made, "labels": metadata(name, job, cluster)["labels"]}
    child: Manifest = {
        "completionMode": "Indexed",
        "completions": size.nodes,
        "parallelism": size.nodes,
        # The first pod that fails ends the Job, and so all the others.
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [_on_disruption("FailJob")]},
        "activeDeadlineSeconds": cluster.deadline_seconds,
        "template": pod_template(labels, pod),
    }
    spec: Manifest = {
        "suspend": bool(cluster.queue),
        "ttlSecondsAfterFinished": cluster.ttl_seconds,
        "network": {
            "enableDNSHostnames": True,
            "subdomain": name,
            # Ranks must find pod 0 before it is ready, or it never will be.
            "publishNotReadyAddresses": True,
        },
        "failurePolicy": {
            "maxRestarts": cluster.max_failures,
            "restartStrategy": "BlockingRecreate",
            "rules": [
                # A pod that was taken away costs nothing.
                _rule("disrupted", "RestartJobSetAndIgnoreMaxRestarts", "PodFailurePolicy"),
                _rule("overdue", "FailJobSet", "DeadlineExceeded"),
            ],
        },
        "replicatedJobs": [{"name": PODS, "replicas": 1, "template": {"spec": child}}],
    }
    return {"apiVersion": JOBSET.api_version, "kind": JOBSET.name, "metadata": made, "spec": spec}


def _on_disruption(action: str) -> Manifest:
    condition = {"type": "DisruptionTarget", "status": "True"}
    return {"action": action, "onPodConditions": [condition]}


def _rule(name: str, action: str, reason: str) -> Manifest:
    return {"name": name, "action": action, "onJobFailureReasons": [reason]}
