"""The Kubernetes objects of a stage, as plain data. Nothing here talks to a cluster.

A stage is a Job; what a JobSet and a RayJob have in its place is in modules of their own.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from operators.launchers.base import StageJob
from sailyard.cluster import MANAGED_BY, RUN_LABEL, STAGE_LABEL, ClusterSettings
from sailyard.pipeline import Stage
from sailyard.settings import Settings
from sailyard.stage.errors import EXIT_FAILED, EXIT_RESUME
from sailyard.stage.torchrun import GRACE_SECONDS

Manifest = dict[str, Any]

CONTAINER = "stage"
RENDEZVOUS_PORT = 29400
USER = 10001
HOME = "/var/lib/sailyard"

INDEX = "batch.kubernetes.io/job-completion-index"
"""Label of a pod with its index in its Job (Kubernetes 1.28)."""

JOB_NAME = "batch.kubernetes.io/job-name"
"""Label of a pod with its Job's name (Kubernetes 1.27)."""

# Annotations hold what labels cannot: names of any length and alphabet.
RUN_ANNOTATION, STAGE_ANNOTATION = RUN_LABEL, STAGE_LABEL

_QUEUE_LABEL = "kueue.x-k8s.io/queue-name"


@dataclass(frozen=True)
class Size:
    """How many pods a stage takes.

    Attributes:
        nodes: Pods.
        gpus_per_node: Devices in each; 0 is the CPU.
        ranks_per_node: Processes in each.
    """

    nodes: int
    gpus_per_node: int
    ranks_per_node: int = 1


def stage_size(stage: Stage, cluster: ClusterSettings) -> Size:
    """Full pods for the devices that a stage wants, no more than allowed; a rank for each device.

    A stage that is not declared distributed is one process, and that sees one pod's devices only.
    """
    gpus = min(stage.gpus, cluster.gpus_per_node)
    if not stage.distributed:
        return Size(1, gpus)
    nodes = max(1, min(cluster.nodes, -(-stage.gpus // cluster.gpus_per_node)))
    return Size(nodes, gpus, max(1, gpus))


def object_name(job: StageJob) -> str:
    """Name of the stage's objects: the same for the same stage of the same run, always.

    At most 45 characters, so that pod names (name-index-suffix) stay DNS labels.
    """
    digest = hashlib.sha256(f"{job.run_id}\0{job.stage}".encode()).hexdigest()[:12]
    slug = re.sub(r"[^a-z0-9]+", "-", job.stage.lower()).strip("-")[:30].rstrip("-")
    return f"sy-{slug}-{digest}"


def check_reachable(settings: Settings) -> None:
    """Refuse places that pods cannot see.

    Raises:
        ValueError: The store or the database lies on this machine.
    """
    if not settings.store.startswith("s3://"):
        raise ValueError(
            f"pods cannot read the store {settings.store}; set SAILYARD_STORE=s3://bucket/prefix"
        )
    if settings.database_url.startswith("sqlite"):
        raise ValueError(
            "pods cannot write to an SQLite file of this machine; set SAILYARD_DATABASE_URL to a "
            "PostgreSQL server"
        )


def job_manifest(job: StageJob, size: Size, cluster: ClusterSettings, yard: Settings) -> Manifest:
    """The Indexed Job of a stage: one pod a node.

    Args:
        job: What to run.
        size: Pods and what is in each.
        cluster: Where and how.
        yard: Places that the pods work with; its keys stay here.

    Raises:
        ValueError: There is no image, or no Secret.
    """
    name = object_name(job)
    # The endpoint's pod becomes the host of the rendezvous: pod 0 and no other.
    command = command_line(job, size, f"{name}-0.{name}")
    container = stage_container(command, size, cluster, yard)
    pod = pod_spec(container, cluster, ends_itself=True, subdomain=name if size.nodes > 1 else "")
    made = metadata(name, job, cluster, queued=True)
    spec: Manifest = {
        "completionMode": "Indexed",
        "completions": size.nodes,
        "parallelism": size.nodes,
        "backoffLimit": cluster.max_failures * size.nodes,
        "podFailurePolicy": {"rules": _failure_rules(size)},
        "activeDeadlineSeconds": cluster.deadline_seconds,
        "ttlSecondsAfterFinished": cluster.ttl_seconds,
        "suspend": bool(cluster.queue),
        "template": pod_template(made, pod),
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": made, "spec": spec}


def service_manifest(job: StageJob, cluster: ClusterSettings, job_uid: str) -> Manifest:
    """The headless Service by which the pods find pod 0; it goes when the Job goes."""
    name = object_name(job)
    made = metadata(name, job, cluster)
    made["ownerReferences"] = [
        {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": job_uid}
    ]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": made,
        "spec": {
            "clusterIP": "None",
            # Ranks must find pod 0 before it is ready, or it never will be.
            "publishNotReadyAddresses": True,
            "selector": {JOB_NAME: name},
            "ports": [{"name": "rendezvous", "port": RENDEZVOUS_PORT, "protocol": "TCP"}],
        },
    }


def command_line(job: StageJob, size: Size, host: str = "") -> list[str]:
    """What a pod runs: the one command of the stage contract; on several nodes, under torchrun.

    Args:
        job: What to run.
        size: Pods and what is in each.
        host: Name of pod 0, where several meet.

    On one node the command starts its ranks itself (SAILYARD_RANKS): then its exit status says how
    the stage ended, which torchrun's does not.
    """
    stage = ["sailyard", "stage", "run", job.stage, "--run", job.run_id]
    stage += ["--force"] if job.force else []
    if size.nodes == 1:
        return ["python", "-m", *stage]
    return [
        "torchrun",
        f"--nnodes={size.nodes}",
        f"--nproc-per-node={size.ranks_per_node}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={host}:{RENDEZVOUS_PORT}",
        f"--rdzv-id={object_name(job)}",
        # Whoever ends the pod kills what will not save in time.
        f"--shutdown-timeout={GRACE_SECONDS}",
        # Behind the two dashes torchrun no longer takes --run for an option of its own.
        "-m",
        "--",
        *stage,
    ]


def metadata(
    name: str, job: StageJob, cluster: ClusterSettings, *, queued: bool = False
) -> Manifest:
    """Of an object of the stage; `queued` if it is for Kueue to admit, should there be a queue."""
    labels = {
        **MANAGED_BY,
        "app.kubernetes.io/name": "sailyard",
        "app.kubernetes.io/component": "stage",
        RUN_LABEL: _label_value(job.run_id),
        STAGE_LABEL: _label_value(job.stage),
    }
    if queued and cluster.queue:
        labels[_QUEUE_LABEL] = cluster.queue
    return {
        "name": name,
        "namespace": cluster.namespace,
        "labels": labels,
        "annotations": {RUN_ANNOTATION: job.run_id, STAGE_ANNOTATION: job.stage},
    }


def pod_template(made: Manifest, pod: Manifest, **labels: str) -> Manifest:
    """Pods labelled as the object whose metadata is given, but for the labels named."""
    return {
        "metadata": {
            "labels": {**made["labels"], **labels},
            "annotations": dict(made["annotations"]),
        },
        "spec": pod,
    }


def _label_value(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", text)[:63].strip("._-")


def _failure_rules(size: Size) -> list[Manifest]:
    """A pod that was taken away or stopped is replaced for free; a stage's own error is final.

    On several nodes torchrun ends with 1 also where a neighbour was lost: there the budget of
    failures decides.
    """
    rules: list[Manifest] = [
        {
            "action": "Ignore",
            "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
        },
        {"action": "Ignore", "onExitCodes": _exit_code(EXIT_RESUME)},
    ]
    if size.nodes == 1:
        rules.append({"action": "FailJob", "onExitCodes": _exit_code(EXIT_FAILED)})
    return rules


def _exit_code(code: int) -> Manifest:
    return {"containerName": CONTAINER, "operator": "In", "values": [code]}


def pod_spec(
    container: Manifest,
    cluster: ClusterSettings,
    *,
    ends_itself: bool = False,
    subdomain: str = "",
) -> Manifest:
    """A pod of one container, with no more rights than it takes.

    Args:
        container: That one.
        cluster: Where and how.
        ends_itself: The container's first process is a stage, whose exit status counts.
        subdomain: Name of the headless Service that the pod is found by.
    """
    spec: Manifest = {
        "restartPolicy": "Never",
        "serviceAccountName": cluster.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        # The first process of a namespace cannot end itself by a signal, and a stage that was
        # killed must be seen as killed: let the pause container be the first.
        **({"shareProcessNamespace": True} if ends_itself else {}),
        "terminationGracePeriodSeconds": cluster.grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            # On a large cache, changing every file's owner would take longer than the stage.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": _volumes(cluster),
    }
    if subdomain:
        spec["subdomain"] = subdomain
    if cluster.pull_secrets:
        spec["imagePullSecrets"] = [{"name": secret} for secret in cluster.pull_secrets]
    if cluster.node_selector:
        spec["nodeSelector"] = dict(cluster.node_selector)
    if cluster.tolerations:
        spec["tolerations"] = [dict(toleration) for toleration in cluster.tolerations]
    if cluster.priority_class:
        spec["priorityClassName"] = cluster.priority_class
    return spec


def stage_container(
    command: list[str] | None,
    size: Size,
    cluster: ClusterSettings,
    yard: Settings,
    **variables: str,
) -> Manifest:
    """A container that can run a stage.

    Args:
        command: None where somebody else says what it runs.
        size: Devices in it.
        cluster: Where and how.
        yard: Places that it works with; its keys stay here.
        variables: More of its environment.

    Raises:
        ValueError: There is no image, or no Secret.
    """
    if not cluster.image:
        raise ValueError("no image to run stages in; set SAILYARD_CLUSTER_IMAGE")
    if not cluster.env_secret:
        raise ValueError(
            "pods get the database's URL and the store's keys from a Secret; name it in "
            "SAILYARD_CLUSTER_ENV_SECRET"
        )
    requests = {"cpu": cluster.cpu, "memory": cluster.memory}
    limits = {"memory": cluster.memory, "ephemeral-storage": cluster.scratch}
    if size.gpus_per_node:
        limits[cluster.gpu_resource] = str(size.gpus_per_node)
    environment = _environment(yard, size) | variables
    container: Manifest = {
        "name": CONTAINER,
        "image": cluster.image,
        "imagePullPolicy": cluster.pull_policy,
        **({"command": command} if command else {}),
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        "resources": {"requests": requests, "limits": limits},
        "volumeMounts": [
            {"name": "home", "mountPath": HOME},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
        "securityContext": confined(),
        "envFrom": [{"secretRef": {"name": cluster.env_secret}}],
    }
    if cluster.cache_claim:
        container["volumeMounts"].append({"name": "cache", "mountPath": f"{HOME}/cache"})
    return container


def confined() -> Manifest:
    """Security context of every container."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def _environment(yard: Settings, size: Size) -> dict[str, str]:
    """Places, never keys: those come from the Secret."""
    known = yard.environment()
    open_names = ("STORE", "S3_ENDPOINT", "S3_SECURE", "S3_REGION")
    return {
        "SAILYARD_HOME": HOME,
        **{f"SAILYARD_{name}": known[f"SAILYARD_{name}"] for name in open_names},
        "SAILYARD_RANKS": str(size.ranks_per_node if size.nodes == 1 else 1),
        "HOME": HOME,
        "PYTHONUNBUFFERED": "1",
        # Pods may share processors, where threads that wait by spinning cost each other far more
        # than sleeping costs a pod that has its own (docs/log.md).
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def _volumes(cluster: ClusterSettings) -> list[Manifest]:
    volumes: list[Manifest] = [
        {"name": "home", "emptyDir": {"sizeLimit": cluster.scratch}},
        {"name": "tmp", "emptyDir": {"sizeLimit": cluster.scratch}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": cluster.shm}},
    ]
    if cluster.cache_claim:
        claim = {"claimName": cluster.cache_claim}
        volumes.append({"name": "cache", "persistentVolumeClaim": claim})
    return volumes
