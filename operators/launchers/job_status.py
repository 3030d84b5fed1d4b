"""What the API's objects say about a Job, its pods and their logs. Nothing here talks to a cluster.

The Job's conditions say how a stage is doing, never its pods: pods vanish with their nodes, come
twice, or are not there yet. Pods say only what is waited for, and why one of them ended.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from operators.launchers.base import JobState
from operators.launchers.manifests import INDEX

GONE = "the Job is gone: deleted by hand, or by its time to live"


def job_state(found: Any, uid: str) -> JobState:
    """The state of the Job of that uid. Args: found: As the API has it now; None: not there."""
    if found is None or found.metadata.uid != uid:
        return JobState.INTERRUPTED
    conditions = {c.type for c in found.status.conditions or [] if c.status == "True"}
    if "Complete" in conditions:
        return JobState.SUCCEEDED
    if "Failed" in conditions:
        return JobState.FAILED
    if found.metadata.deletion_timestamp is not None:
        return JobState.INTERRUPTED
    there = (found.status.ready or 0) + (found.status.succeeded or 0)
    if found.spec.suspend or there < found.spec.completions:
        return JobState.WAITING
    return JobState.RUNNING


def has_ended(state: JobState) -> bool:
    """Whether nothing more will come of a job."""
    return state not in (JobState.WAITING, JobState.RUNNING)


def explain(state: JobState, found: Any, pods: Iterable[Any], queue: str) -> str:
    """In words: how the Job failed, or what it waits for; "" while all is well.

    Args:
        state: Of the Job.
        found: The Job.
        pods: Its pods, the oldest first.
        queue: Kueue's queue of the settings, or "".
    """
    if state is JobState.INTERRUPTED:
        return GONE
    if state is JobState.FAILED:
        return _failure(found, pods)
    if state is JobState.WAITING:
        return _waits_for(found, pods, queue)
    return ""


def rank_zero(pods: Iterable[Any]) -> Any:
    """The newest pod of index 0, or None: there may be more pods than expected."""
    ranks = [pod for pod in pods if (pod.metadata.labels or {}).get(INDEX) == "0"]
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


def _failure(found: Any, pods: Iterable[Any]) -> str:
    failed = next(c for c in found.status.conditions if c.type == "Failed")
    if failed.reason == "DeadlineExceeded":
        return (
            f"it ran longer than {found.spec.active_deadline_seconds} s; raise "
            "SAILYARD_CLUSTER_DEADLINE_SECONDS, and it resumes where it was"
        )
    text = f"{failed.reason}: {failed.message}"
    for pod in reversed(list(pods)):
        for status in pod.status.container_statuses or []:
            ended = status.state.terminated if status.state else None
            if ended is not None and ended.reason == "OOMKilled":
                return (
                    f"{text}; {pod.metadata.name} was OOMKilled: raise SAILYARD_CLUSTER_MEMORY "
                    "(SAILYARD_CLUSTER_SHM is part of it), and it resumes where it was"
                )
    return text


def _waits_for(found: Any, pods: Iterable[Any], queue: str) -> str:
    if found.spec.suspend:
        return (
            f"in Kueue's queue {queue}, not admitted yet"
            if queue
            else "the Job is suspended; somebody must resume it"
        )
    known = list(pods)
    for pod in known:
        if reason := _pod_waits_for(pod):
            return f"{pod.metadata.name}: {reason}"
    return "its pods are starting" if known else "its pods do not exist yet"


def _pod_waits_for(pod: Any) -> str:
    for status in pod.status.container_statuses or []:
        waiting = status.state.waiting if status.state else None
        if waiting is not None and waiting.reason not in (None, "PodInitializing"):
            return f"{waiting.reason}: {waiting.message or status.image}"
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return f"{condition.reason}: {condition.message}"
    return ""
