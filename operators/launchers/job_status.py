"""What the API says about a stage, its pods and their logs. Nothing here talks to a cluster.

The object's own status says how a stage is doing, never its pods: pods vanish with their nodes,
come twice, or are not there yet. Pods say only what is waited for, and why one of them ended.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Any

from operators.launchers.base import JobState
from operators.launchers.jobset_manifest import JOBSET_NAME
from operators.launchers.manifests import INDEX, JOB_NAME
from operators.launchers.rayjob_manifest import COMPONENT, OBJECT, SUBMITTER
from sailyard.cluster import JOB, JOBSET, RAYJOB, Kind
from sailyard.stage.errors import EXIT_FAILED

GONE = "the {} is gone: deleted by hand, or by its time to live"

WORKLOAD_OF = "kueue.x-k8s.io/job-uid"
"""Label of Kueue's Workload with the uid of what it stands for."""

PODS_OF = {JOB: JOB_NAME, JOBSET: JOBSET_NAME, RAYJOB: OBJECT}
"""Kind -> label of its pods with its name."""

# Ray's own words about a driver that ended with an error, in a RayJob's message.
_EXIT_CODE = re.compile(r"Job entrypoint command failed with exit code (-?\d+)")


def job_state(kind: Kind, found: Any, uid: str) -> JobState:
    """The state of the object of that uid.

    Args:
        kind: Of the object.
        found: As the API has it now; None: not there.
        uid: Of the object that is meant.
    """
    if found is None or found["metadata"]["uid"] != uid:
        return JobState.INTERRUPTED
    status = found.get("status") or {}
    if kind == RAYJOB:
        state = _rayjob_state(status)
    else:
        state = _state_by_conditions(kind, found["spec"], status)
    if has_ended(state):
        return state
    if "deletionTimestamp" in found["metadata"]:
        return JobState.INTERRUPTED
    return JobState.WAITING if found["spec"].get("suspend") else state


def _state_by_conditions(kind: Kind, spec: Any, status: Any) -> JobState:
    conditions = {c["type"] for c in status.get("conditions", []) if c["status"] == "True"}
    if conditions & {"Complete", "Completed"}:  # of a Job, of a JobSet
        return JobState.SUCCEEDED
    if "Failed" in conditions:
        return JobState.FAILED
    if kind == JOB:
        there, wanted = status.get("ready", 0) + status.get("succeeded", 0), spec["completions"]
    else:  # counts Jobs all of whose pods are ready: ours is one
        of_jobs = status.get("replicatedJobsStatus", [])
        there, wanted = sum(jobs["ready"] + jobs["succeeded"] for jobs in of_jobs), 1
    return JobState.RUNNING if there >= wanted else JobState.WAITING


def _rayjob_state(status: Any) -> JobState:
    """KubeRay sees neither exit statuses nor lost nodes: what is not the stage's own error, or the
    deadline, is worth another try."""
    deployment = status.get("jobDeploymentStatus", "")
    if deployment == "Complete":
        ended_well = status.get("jobStatus") == "SUCCEEDED"
        return JobState.SUCCEEDED if ended_well else JobState.INTERRUPTED
    if deployment == "ValidationFailed":
        return JobState.FAILED
    if deployment == "Failed":
        ended = _EXIT_CODE.match(status.get("message", ""))
        own_error = ended is not None and int(ended[1]) == EXIT_FAILED
        final = own_error or status.get("reason") == "DeadlineExceeded"
        return JobState.FAILED if final else JobState.INTERRUPTED
    running = deployment == "Running" and status.get("jobStatus") == "RUNNING"
    return JobState.RUNNING if running else JobState.WAITING


def has_ended(state: JobState) -> bool:
    """Whether nothing more will come of a job."""
    return state not in (JobState.WAITING, JobState.RUNNING)


def explain(
    kind: Kind,
    state: JobState,
    found: Any,
    pods: Iterable[Any],
    queue: str,
    workloads: Iterable[Any] = (),
) -> str:
    """In words: how the stage failed, or what it waits for; "" while all is well.

    Args:
        kind: Of the object.
        state: Of the object.
        found: The object, or None.
        pods: Its pods, the oldest first.
        queue: Kueue's queue of the settings, or "".
        workloads: What Kueue made of the object, as its API has it.
    """
    if state is JobState.FAILED or (state is JobState.INTERRUPTED and _has_failed(found)):
        return _failure(found, pods)
    if state is JobState.INTERRUPTED:
        return GONE.format(kind.name)
    if state is JobState.WAITING:
        return _waits_for(kind, found, pods, queue, workloads)
    return ""


def rank_zero(pods: Iterable[Any]) -> Any:
    """The newest pod of index 0, or of those that submit, or None: there may be more pods than
    expected."""

    def speaks(labels: dict[str, str]) -> bool:
        return labels.get(INDEX) == "0" or labels.get(COMPONENT) == SUBMITTER

    ranks = [pod for pod in pods if speaks(pod.metadata.labels or {})]
    return ranks[-1] if ranks else None


def by_age(pods: Iterable[Any]) -> list[Any]:
    """The oldest first, by the API server's clock."""
    return sorted(pods, key=lambda pod: (pod.metadata.creation_timestamp, pod.metadata.name))


class Cursor:
    """How far the log of a pod has been read, in the API's own time stamps."""

    def __init__(self) -> None:
        self._pod = ""
        self._last = ""
        self._begin = ""
        self._read_at = 0.0

    def turn_to(self, pod_uid: str) -> None:
        """A new pod is read from its beginning."""
        if pod_uid != self._pod:
            self._pod, self._last = pod_uid, ""

    def since(self) -> dict[str, Any]:
        """For the next request: spares the API server the part that was read.

        An age, not a time: clocks may differ.
        """
        self._begin = self._last
        if not self._last:
            return {}
        return {"since_seconds": int(time.monotonic() - self._read_at) + 60}

    def take(self, line: str) -> str | None:
        """The line without its stamp; None when it was read before."""
        stamp, _, text = line.partition(" ")
        # Stamps have nine digits and trailing zeros cut off, so ".1Z" < ".12Z" holds only without
        # the Z.
        key = stamp.rstrip("Z")
        # Held against where this request began: within it, two lines may have one stamp.
        if key <= self._begin:
            return None
        self._last, self._read_at = key, time.monotonic()
        return text


def _has_failed(found: Any) -> bool:
    return found is not None and found.get("status", {}).get("jobDeploymentStatus") == "Failed"


def _failure(found: Any, pods: Iterable[Any]) -> str:
    status = found["status"]
    said = next((c for c in status.get("conditions", []) if c["type"] == "Failed"), status)
    # A JobSet has one rule that makes it fail, for the deadline of its Job.
    if said.get("reason") in ("DeadlineExceeded", "FailJobSetFailurePolicyAction"):
        return (
            f"it ran longer than {_deadline(found['spec'])} s; raise "
            "SAILYARD_CLUSTER_DEADLINE_SECONDS, and it resumes where it was"
        )
    # Ray repeats the end of the log after its first line, and the task has that already.
    first_line = str(said.get("message", "")).partition("\n")[0]
    text = f"{said.get('reason') or status.get('jobDeploymentStatus')}: {first_line}"
    for pod in reversed(list(pods)):
        for container in pod.status.container_statuses or []:
            ended = container.state.terminated if container.state else None
            if ended is not None and ended.reason == "OOMKilled":
                return (
                    f"{text}; {pod.metadata.name} was OOMKilled: raise SAILYARD_CLUSTER_MEMORY "
                    "(SAILYARD_CLUSTER_SHM is part of it), and it resumes where it was"
                )
    return text


def _deadline(spec: Any) -> int:
    if "replicatedJobs" in spec:
        spec = spec["replicatedJobs"][0]["template"]["spec"]
    return int(spec["activeDeadlineSeconds"])


def _waits_for(
    kind: Kind, found: Any, pods: Iterable[Any], queue: str, workloads: Iterable[Any]
) -> str:
    if found["spec"].get("suspend"):
        if not queue:
            return f"the {kind.name} is suspended; somebody must resume it"
        why = [reason for workload in workloads if (reason := _not_admitted(workload))]
        return ": ".join([f"in Kueue's queue {queue}, not admitted yet", *why[-1:]])
    known = list(pods)
    for pod in known:
        if reason := _pod_waits_for(pod):
            return f"{pod.metadata.name}: {reason}"
    return "its pods are starting" if known else "its pods do not exist yet"


def _not_admitted(workload: Any) -> str:
    conditions = {c["type"]: c for c in workload.get("status", {}).get("conditions", [])}
    quota = conditions.get("QuotaReserved", {})
    return str(quota.get("message", "")) if quota.get("status") == "False" else ""


def _pod_waits_for(pod: Any) -> str:
    for status in pod.status.container_statuses or []:
        waiting = status.state.waiting if status.state else None
        if waiting is not None and waiting.reason not in (None, "PodInitializing"):
            return f"{waiting.reason}: {waiting.message or status.image}"
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return f"{condition.reason}: {condition.message}"
    return ""
