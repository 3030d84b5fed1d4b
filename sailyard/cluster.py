"""How stages run on a Kubernetes cluster. Read from ``SAILYARD_CLUSTER_*`` variables only.

Lists and mappings are written as JSON: ``SAILYARD_CLUSTER_NODE_SELECTOR={"gpu": "h100"}``. No
setting enters a cache key. Secrets are named here, never held.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

QUANTITY = r"^[0-9]+(\.[0-9]+)?([EPTGMk]i?|m)?$"
DNS_LABEL = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"

MANAGED_BY = {"app.kubernetes.io/managed-by": "sailyard"}
"""Label of every object that a launcher makes, and of no other object."""

RUN_LABEL, STAGE_LABEL = "sailyard.dev/run", "sailyard.dev/stage"


class Right(NamedTuple):
    """One thing that must be allowed in the namespace, and what for.

    Attributes:
        group: Of the API; "" is the core group.
        resource: "jobs", or with a part of it: "pods/log".
        verb: As RBAC has it.
        why: For people, and for the test that looks for the code.
    """

    group: str
    resource: str
    verb: str
    why: str


class Kind(NamedTuple):
    """A kind of object that a stage may be.

    Attributes:
        group, version: Of its API.
        plural: As the API's addresses have it.
        name: As manifests have it.
        variable: The setting that asks for it; "" for what every cluster has.
    """

    group: str
    version: str
    plural: str
    name: str
    variable: str = ""

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}"


JOB = Kind("batch", "v1", "jobs", "Job")
JOBSET = Kind("jobset.x-k8s.io", "v1alpha2", "jobsets", "JobSet", "SAILYARD_CLUSTER_JOBSET")
RAYJOB = Kind("ray.io", "v1", "rayjobs", "RayJob", "SAILYARD_CLUSTER_RAY_WORKERS")
KINDS = {kind.plural: kind for kind in (JOB, JOBSET, RAYJOB)}

WORKLOAD = Kind("kueue.x-k8s.io", "v1beta2", "workloads", "Workload", "SAILYARD_CLUSTER_QUEUE")
"""What Kueue makes of each object in its queues; no stage is one."""

RIGHTS = (
    Right("batch", "jobs", "create", "a stage is a Job"),
    Right("batch", "jobs", "get", "its conditions say how it is doing; finding it again"),
    Right("batch", "jobs", "list", "finding leftovers"),
    Right("batch", "jobs", "watch", "hearing at once that it has ended"),
    Right("batch", "jobs", "delete", "cancelling, and making room for the next try"),
    Right("", "services", "create", "pods of one stage find each other by name"),
    Right("", "services", "get", "one that goes with the Job of an earlier try is no use"),
    Right("", "services", "delete", "making room for the next try"),
    Right("", "pods", "list", "which pod is rank 0, what it waits for, what ended it"),
    Right("", "pods/log", "get", "following rank 0"),
)
"""All the rights that launcher and trigger use, and ``sailyard doctor --cluster``."""

# As those of Jobs, and as little: where the settings ask for such objects.
JOBSET_RIGHTS, RAYJOB_RIGHTS = (
    tuple(Right(kind.group, kind.plural, r.verb, r.why) for r in RIGHTS if r.resource == "jobs")
    for kind in (JOBSET, RAYJOB)
)

QUEUE_RIGHTS = (
    Right(WORKLOAD.group, WORKLOAD.plural, "list", "why Kueue has not admitted a stage yet"),
)


class ClusterSettings(BaseSettings):
    """Namespace, image, size and placement of the pods that stages run in."""

    model_config = SettingsConfigDict(
        env_prefix="SAILYARD_CLUSTER_", extra="forbid", use_attribute_docstrings=True
    )

    context: str = ""
    """Context of the kubeconfig; empty: the pod's own service account, else the current one."""

    namespace: str = Field("sailyard", pattern=DNS_LABEL)
    """Namespace of the Jobs."""

    image: str = ""
    """Image with ``sailyard[train]``, best by digest. Without one nothing can be launched."""

    pull_policy: str = Field("IfNotPresent", pattern="^(Always|IfNotPresent|Never)$")
    """When nodes pull the image."""

    pull_secrets: list[str] = []
    """Names of Secrets with the registry's credentials."""

    env_secret: str = ""
    """Name of a Secret whose keys become variables: SAILYARD_DATABASE_URL,
    SAILYARD_S3_ACCESS_KEY, SAILYARD_S3_SECRET_KEY. Without one nothing can be launched."""

    service_account: str = "default"
    """Service account of the pods; they get no token of it."""

    nodes: int = Field(1, ge=1, le=4096)
    """Most pods that one stage may take."""

    gpus_per_node: int = Field(8, ge=1, le=64)
    """Devices per pod, for stages that want any; a stage that wants fewer gets fewer."""

    gpu_resource: str = Field("nvidia.com/gpu", min_length=1)
    """Name under which the device plugin offers the devices."""

    cpu: str = Field("2", pattern=QUANTITY)
    """CPU that each pod asks for."""

    memory: str = Field("8Gi", pattern=QUANTITY)
    """Memory that each pod asks for, and its limit."""

    shm: str = Field("2Gi", pattern=QUANTITY)
    """Size of /dev/shm; it counts as the pod's memory."""

    scratch: str = Field("50Gi", pattern=QUANTITY)
    """Most that a pod may keep on its node's disk: work folders, fetched artifacts."""

    cache_claim: str = ""
    """PersistentVolumeClaim for fetched artifacts, shared by all pods; empty: each pod its own."""

    node_selector: dict[str, str] = {}
    """Labels that a node must have."""

    tolerations: list[dict[str, Any]] = []
    """Taints to put up with, as in a pod's spec."""

    priority_class: str = ""
    """PriorityClass of the pods."""

    jobset: bool = False
    """A stage on several nodes is a JobSet, whose pods all start anew when one of them fails. Needs
    the JobSet controller in the cluster."""

    ray_workers: int = Field(0, ge=0, le=4096)
    """Pods beside the stage's own over which a stage that spreads is spread, as a RayJob; 0: none,
    it is a Job. Needs the KubeRay operator in the cluster."""

    queue: str = ""
    """Kueue LocalQueue; Jobs then begin suspended and Kueue admits them as a whole."""

    max_failures: int = Field(3, ge=0)
    """Pods per node that may fail before the Job does. Lost nodes, evictions and preemptions
    are not counted."""

    deadline_seconds: int = Field(7 * 24 * 3600, ge=1)
    """Longest that a Job may run, on the object itself, so that it holds without Airflow. Time
    in Kueue's queue does not count."""

    ttl_seconds: int = Field(24 * 3600, ge=0)
    """How long an ended Job and its pods are kept for a look."""

    grace_seconds: int = Field(120, ge=1)
    """Time that a stage has to save a checkpoint when its pod must go."""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What stages may be under these settings."""
        asked = {JOBSET: self.jobset, RAYJOB: self.ray_workers > 0}
        return (JOB, *(kind for kind in asked if asked[kind]))

    @property
    def rights(self) -> tuple[Right, ...]:
        """What must be allowed under these settings."""
        more = {JOBSET: JOBSET_RIGHTS, RAYJOB: RAYJOB_RIGHTS}
        of_kinds = (right for kind in self.kinds for right in more.get(kind, ()))
        return (*RIGHTS, *of_kinds, *(QUEUE_RIGHTS if self.queue else ()))
