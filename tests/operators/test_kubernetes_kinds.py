"""Stages as JobSets and RayJobs: chosen by settings, followed by what their controllers write."""

from __future__ import annotations

from typing import Any

import pytest

from operators.launchers import JobState, StageJob
from operators.launchers.kubernetes import KubernetesLauncher, MissingApi
from sailyard.cluster import (
    JOB,
    JOBSET,
    JOBSET_RIGHTS,
    QUEUE_RIGHTS,
    RAYJOB,
    RAYJOB_RIGHTS,
    RIGHTS,
    ClusterSettings,
    Right,
)
from sailyard.cluster_api import connect, split_handle, stage_jobs
from sailyard.runs import create_run
from tests.operators.fake_cluster import BUILT_IN, FakeCluster
from tests.operators.test_kubernetes_launcher import Follower, cluster, doctor, why

__all__ = ["cluster"]

# Eight devices in pods of four, and one whose map step spreads.
WIDE, SPREADS = "alignment.warmup", "curation.caption2"


@pytest.fixture
def asked(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    """A cluster with both controllers, and settings that ask for what they make."""
    monkeypatch.setenv("SAILYARD_CLUSTER_JOBSET", "true")
    monkeypatch.setenv("SAILYARD_CLUSTER_RAY_WORKERS", "2")
    return cluster


@pytest.fixture
def run_id() -> str:
    return create_run("2b")


def jobset_status(ready: int = 0, succeeded: int = 0, **more: Any) -> dict[str, Any]:
    of_pods = {"name": "pod", "ready": ready, "succeeded": succeeded, "failed": 0, "active": 1}
    return {"replicatedJobsStatus": [{**of_pods, "suspended": 0}], "restarts": 0, **more}


def condition(kind: str, reason: str, message: str = "") -> dict[str, str]:
    return {"type": kind, "status": "True", "reason": reason, "message": message}


def test_settings_and_stage_decide_the_kind(asked: FakeCluster, run_id: str) -> None:
    launcher = KubernetesLauncher()
    kinds = {
        stage: split_handle(launcher.submit(StageJob(stage, run_id)))[0]
        for stage in (WIDE, SPREADS, "curation.charts")
    }
    assert kinds == {WIDE: JOBSET, SPREADS: RAYJOB, "curation.charts": JOB}
    assert not asked.has("services", object_of(asked, "jobsets")), "its controller makes one"
    plain = KubernetesLauncher(launcher.cluster.model_copy(update={"jobset": False}))
    assert split_handle(plain.submit(StageJob(WIDE, run_id)))[0] == JOB


def object_of(cluster: FakeCluster, kind: str) -> str:
    return next(name for known, name in cluster.objects if known == kind)


@pytest.mark.parametrize(("stage", "variable"), [(WIDE, "JOBSET"), (SPREADS, "RAY_WORKERS")])
def test_what_is_not_installed_is_named(
    asked: FakeCluster, run_id: str, stage: str, variable: str
) -> None:
    asked.apis = BUILT_IN
    with pytest.raises(
        MissingApi, match=f"SAILYARD_CLUSTER_{variable} asks for a .* no .* version"
    ):
        KubernetesLauncher().submit(StageJob(stage, run_id))
    assert "all that launching takes" in doctor()


@pytest.mark.parametrize("stage", [WIDE, SPREADS])
def test_a_restarted_worker_joins_and_cancel_deletes_it_alone(
    asked: FakeCluster, run_id: str, stage: str
) -> None:
    launcher = KubernetesLauncher()
    handle = launcher.submit(StageJob(stage, run_id))
    other = launcher.submit(StageJob(stage, create_run("2b")))
    assert KubernetesLauncher().submit(StageJob(stage, run_id)) == handle
    launcher.cancel(handle, 120.0)
    assert launcher.status(handle) is JobState.INTERRUPTED
    assert "is gone" in why(launcher, handle)
    again = launcher.submit(StageJob(stage, run_id))
    assert again != handle
    launcher.cancel(handle, 120.0)  # an old handle never ends a newer object
    assert launcher.status(again) is launcher.status(other) is JobState.WAITING


def test_a_jobset_is_followed_through_a_restart_to_its_end(asked: FakeCluster, run_id: str) -> None:
    launcher = KubernetesLauncher()
    handle = launcher.submit(StageJob(WIDE, run_id))
    follower = Follower(launcher, handle)
    follower.wait_for("waiting: its pods do not exist yet")
    first = asked.add_pod(handle, 0, "aaaaa")
    asked.set_status(handle, **jobset_status(ready=1))
    asked.say(first, "step 1")
    follower.wait_for("step 1")
    assert launcher.status(handle) is JobState.RUNNING
    # A node was taken: all pods go and come anew.
    asked.lose_pod(first)
    restarting = condition("RestartingJobSet", "FailurePolicy_disrupted")
    asked.set_status(handle, **jobset_status(conditions=[restarting]))
    assert launcher.status(handle) is JobState.WAITING
    second = asked.add_pod(handle, 0, "bbbbb")
    asked.set_status(handle, **jobset_status(ready=1))
    asked.say(second, "resumed at step 1", "done")
    follower.wait_for("done")
    asked.close_log(second)
    done = condition("Completed", "AllJobsCompleted")
    asked.set_status(handle, **jobset_status(succeeded=1, conditions=[done]))
    follower.result()
    assert launcher.status(handle) is JobState.SUCCEEDED


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("ReachedMaxRestarts", "ReachedMaxRestarts: jobset failed"),
        ("FailJobSetFailurePolicyAction", "raise SAILYARD_CLUSTER_DEADLINE_SECONDS"),
    ],
)
def test_a_jobset_that_failed_says_why(
    asked: FakeCluster, run_id: str, reason: str, told: str
) -> None:
    launcher = KubernetesLauncher()
    handle = launcher.submit(StageJob(WIDE, run_id))
    failed = condition("Failed", reason, "jobset failed due to reaching max number of restarts")
    asked.set_status(handle, **jobset_status(conditions=[failed]), terminalState="Failed")
    assert launcher.status(handle) is JobState.FAILED
    assert told in why(launcher, handle)


def test_a_rayjob_is_followed_by_the_pod_that_submits(asked: FakeCluster, run_id: str) -> None:
    launcher = KubernetesLauncher(ClusterSettings().model_copy(update={"queue": "research"}))
    handle = launcher.submit(StageJob(SPREADS, run_id))
    follower = Follower(launcher, handle)
    asked.set_status(handle, jobDeploymentStatus="Suspended")
    follower.wait_for("in Kueue's queue research, not admitted yet")
    asked.suspend(handle, False)
    asked.set_status(handle, jobDeploymentStatus="Initializing")
    unschedulable = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    asked.say(asked.add_pod(handle, 1, "head"), "of the head")
    worker = asked.add_pod(
        handle, 2, "worker", "Pending", conditions=[{**unschedulable, "message": message}]
    )
    follower.wait_for("Insufficient nvidia.com/gpu")
    asked.set_pod(worker, "Running")
    submitter = asked.add_pod(handle, 0, "submit")
    asked.set_status(handle, jobDeploymentStatus="Running", jobStatus="PENDING")
    assert launcher.status(handle) is JobState.WAITING
    asked.set_status(handle, jobDeploymentStatus="Running", jobStatus="RUNNING")
    assert launcher.status(handle) is JobState.RUNNING
    asked.say(submitter, "captions judged: 64")
    follower.wait_for("captions judged")
    asked.close_log(submitter)
    asked.set_status(handle, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    assert "of the head" not in follower.result()
    assert launcher.status(handle) is JobState.SUCCEEDED


RAY_SAYS = "Job entrypoint command failed with exit code {}, last available logs (truncated):\nlog"


@pytest.mark.parametrize(
    ("status", "state", "told"),
    [
        ({"reason": "AppFailed", "message": RAY_SAYS.format(1)}, "failed", "exit code 1"),
        ({"reason": "AppFailed", "message": RAY_SAYS.format(75)}, "interrupted", "exit code 75"),
        ({"reason": "AppFailed", "message": RAY_SAYS.format(-9)}, "interrupted", "exit code -9"),
        ({"reason": "AppFailed", "message": "Ray head pod not found."}, "interrupted", "head pod"),
        ({"reason": "SubmissionFailed", "message": "no"}, "interrupted", "SubmissionFailed: no"),
        ({"reason": "DeadlineExceeded", "message": "long"}, "failed", "DEADLINE_SECONDS"),
    ],
)
def test_only_a_stages_own_error_and_the_deadline_are_final(
    asked: FakeCluster, run_id: str, status: dict[str, str], state: str, told: str
) -> None:
    launcher = KubernetesLauncher()
    handle = launcher.submit(StageJob(SPREADS, run_id))
    asked.set_status(handle, jobDeploymentStatus="Failed", jobStatus="FAILED", **status)
    assert launcher.status(handle) == state
    reason = why(launcher, handle)
    assert told in reason
    assert "\nlog" not in reason


def test_the_next_try_of_a_rayjob_makes_room_for_itself(asked: FakeCluster, run_id: str) -> None:
    launcher = KubernetesLauncher()
    first = launcher.submit(StageJob(SPREADS, run_id))
    asked.set_status(
        handle := first, jobDeploymentStatus="Failed", message="Ray head pod not found."
    )
    second = launcher.submit(StageJob(SPREADS, run_id))
    assert second != handle
    assert launcher.status(second) is JobState.WAITING


# --- rights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right", [*JOBSET_RIGHTS, *RAYJOB_RIGHTS], ids=lambda right: f"{right.verb} {right.resource}"
)
def test_without_the_right_its_code_fails(asked: FakeCluster, run_id: str, right: Right) -> None:
    asked.denied = {right[:3]}
    stage = WIDE if right in JOBSET_RIGHTS else SPREADS
    with pytest.raises(Exception, match=f"may not {right.verb} {right.resource}"):
        use_all(asked, StageJob(stage, run_id))
    assert f"may not {right.verb} {right.resource} ({right.group})" in doctor() or (
        right.verb == "list"
    )


def test_no_other_right_is_used(asked: FakeCluster, run_id: str) -> None:
    use_all(asked, StageJob(WIDE, run_id))
    use_all(asked, StageJob(SPREADS, run_id))
    used = {right for right in asked.used if right[0] in (JOBSET.group, RAYJOB.group)}
    assert used == {right[:3] for right in (*JOBSET_RIGHTS, *RAYJOB_RIGHTS)}


def use_all(cluster: FakeCluster, job: StageJob) -> None:
    """Everything that launcher, follower and doctor do with such an object."""
    launcher = KubernetesLauncher()
    handle = launcher.submit(job)
    kind = split_handle(handle)[0]
    lines = launcher.logs(handle)
    next(lines)
    if kind == JOBSET:
        done = condition("Completed", "AllJobsCompleted")
        cluster.set_status(handle, **jobset_status(succeeded=1, conditions=[done]))
    else:
        cluster.set_status(handle, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    list(lines)
    infos = stage_jobs(connect(launcher.cluster), launcher.cluster)
    assert {info.state for info in infos if info.kind == kind} == {"complete"}
    launcher.cancel(handle, 120.0)
    assert not cluster.has(kind.plural, handle)


def test_rights_are_those_that_the_settings_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ClusterSettings().rights == RIGHTS
    monkeypatch.setenv("SAILYARD_CLUSTER_JOBSET", "true")
    monkeypatch.setenv("SAILYARD_CLUSTER_QUEUE", "research")
    assert ClusterSettings().rights == (*RIGHTS, *JOBSET_RIGHTS, *QUEUE_RIGHTS)
