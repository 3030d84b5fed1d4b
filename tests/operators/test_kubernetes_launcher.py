"""The Kubernetes launcher with its real client against a server on a socket: see fake_cluster."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from kubernetes.client.exceptions import ApiException
from kubernetes_asyncio.client.exceptions import ApiException as AsyncApiException
from typer.testing import CliRunner

from operators.launchers import JobState, StageJob, kubernetes_follow, make_launcher
from operators.launchers import kubernetes as module
from operators.launchers.job_status import WORKLOAD_OF
from operators.launchers.kubernetes import ForeignObject, KubernetesLauncher
from operators.launchers.kubernetes_follow import JobFollower, connect_async
from operators.launchers.manifests import object_name
from sailyard import cluster_api
from sailyard.cluster import MANAGED_BY, QUEUE_RIGHTS, RIGHTS, ClusterSettings, Right
from sailyard.runs import create_run, load_run, run_key
from sailyard.stage.results import StageResult, write_result
from sailyard.yard import Yard
from tests.operators.fake_cluster import BUILT_IN, FakeCluster, serve

# Eight devices in pods of four: two pods.
STAGE = "alignment.warmup"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    monkeypatch.setattr(kubernetes_follow, "POLL_SECONDS", 0.04)
    monkeypatch.setattr(kubernetes_follow, "DRAIN_SECONDS", 120.0)
    # The store of these tests lies here: no pod will ever look for it.
    monkeypatch.setattr(module, "check_reachable", lambda settings: None)
    fake = FakeCluster()
    with serve(fake, tmp_path) as kubeconfig:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        monkeypatch.setenv("SAILYARD_CLUSTER_IMAGE", "example/train")
        monkeypatch.setenv("SAILYARD_CLUSTER_ENV_SECRET", "keys")
        monkeypatch.setenv("SAILYARD_CLUSTER_NODES", "2")
        monkeypatch.setenv("SAILYARD_CLUSTER_GPUS_PER_NODE", "4")
        yield fake


@pytest.fixture
def launcher(cluster: FakeCluster) -> KubernetesLauncher:
    return KubernetesLauncher()


@pytest.fixture
def job() -> StageJob:
    return StageJob(STAGE, create_run("2b"))


class Follower(threading.Thread):
    """Reads a job's lines while the test plays the cluster."""

    def __init__(self, launcher: KubernetesLauncher, handle: str) -> None:
        super().__init__(daemon=True)
        self.launcher, self.handle = launcher, handle
        self.lines: list[str] = []
        self.start()

    def run(self) -> None:
        for line in self.launcher.logs(self.handle):
            self.lines.append(line)

    def wait_for(self, text: str) -> None:
        wait_until(lambda: any(text in line for line in self.lines), lambda: self.lines)

    def result(self) -> list[str]:
        self.join(120)
        assert not self.is_alive(), self.lines
        return self.lines


def why(launcher: KubernetesLauncher, handle: str) -> str:
    """The reason that the trigger is given, once the stage has ended."""

    async def follow() -> str:
        api = await connect_async(launcher.cluster)
        try:
            follower = JobFollower(api, launcher.cluster, handle)
            async for _ in follower.lines():
                pass
            return follower.reason
        finally:
            await api.close()

    return asyncio.run(follow())


def wait_until(true: Callable[[], bool], told: Callable[[], Any] = lambda: "") -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline, told()
        time.sleep(0.01)


# --- submitting --------------------------------------------------------------------------------


def test_a_restarted_worker_joins_the_job(
    launcher: KubernetesLauncher, cluster: FakeCluster, job: StageJob
) -> None:
    handle = launcher.submit(job)
    name, uid = handle.split("/")
    assert cluster.objects["services", name]["metadata"]["ownerReferences"][0]["uid"] == uid
    assert make_launcher("kubernetes").submit(job) == handle
    assert launcher.status(handle) is JobState.WAITING


def test_the_next_try_makes_room_for_itself_and_resumes(
    launcher: KubernetesLauncher, cluster: FakeCluster, job: StageJob
) -> None:
    first = launcher.submit(job)
    cluster.end(first, "Failed", "BackoffLimitExceeded")
    cluster.slow_deletion = True
    collector = threading.Thread(target=_collect, args=(cluster, first))
    collector.start()
    second = launcher.submit(job)
    collector.join()
    assert second != first
    assert launcher.status(second) is JobState.WAITING
    assert launcher.status(first) is JobState.INTERRUPTED
    owner = cluster.objects["services", second.split("/")[0]]["metadata"]["ownerReferences"][0]
    assert owner["uid"] == second.split("/")[1]


def _collect(cluster: FakeCluster, handle: str) -> None:
    wait_until(lambda: "deletionTimestamp" in cluster.job(handle)["metadata"])
    cluster.collect(handle)


def test_a_service_of_an_earlier_try_is_replaced(
    launcher: KubernetesLauncher, cluster: FakeCluster, job: StageJob
) -> None:
    """It would vanish with its owner in the middle of the new try."""
    first = launcher.submit(job)
    name = first.split("/")[0]
    old = cluster.objects["services", name]
    cluster.write("jobs", cluster.job(first), "DELETED")
    second = launcher.submit(job)
    new = cluster.objects["services", name]
    assert new["metadata"]["uid"] != old["metadata"]["uid"]
    assert new["metadata"]["ownerReferences"][0]["uid"] == second.split("/")[1]


def test_two_workers_at_once_make_one_job(cluster: FakeCluster, job: StageJob) -> None:
    """One of them gets a 409."""
    handles: list[str] = []
    threads = [
        threading.Thread(target=lambda: handles.append(KubernetesLauncher().submit(job)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(handles) == 4
    assert len(set(handles)) == 1


def test_an_object_of_somebody_else_is_left_alone(
    launcher: KubernetesLauncher, cluster: FakeCluster, job: StageJob
) -> None:
    body = {"metadata": {"name": object_name(job)}, "spec": {"completions": 1, "template": {}}}
    cluster.create("jobs", "sailyard", body)
    with pytest.raises(ForeignObject, match="rename or delete"):
        launcher.submit(job)
    assert cluster.has("jobs", object_name(job))


def test_cancel_deletes_the_job_with_its_service_and_nothing_else(
    launcher: KubernetesLauncher, cluster: FakeCluster, job: StageJob
) -> None:
    others = launcher.submit(StageJob("alignment.fine_grained", job.run_id))
    mine = launcher.submit(job)
    launcher.cancel(mine, grace_s=120.0)
    assert not cluster.has("jobs", mine)
    assert not cluster.has("services", mine)
    assert cluster.has("jobs", others)
    assert cluster.has("services", others)
    again = launcher.submit(job)
    launcher.cancel(mine, grace_s=120.0)  # an old handle never ends a newer Job
    assert cluster.has("jobs", again)


# --- following ---------------------------------------------------------------------------------


def test_the_log_of_rank_0_is_followed_to_its_end(
    launcher: KubernetesLauncher, cluster: FakeCluster, job: StageJob
) -> None:
    handle = launcher.submit(job)
    follower = Follower(launcher, handle)
    follower.wait_for("waiting: its pods do not exist yet")
    # Pods come in any order, and end in any.
    cluster.say(cluster.add_pod(handle, 1, "bbbbb"), "of rank 1")
    zero = cluster.add_pod(handle, 0, "aaaaa")
    cluster.say(zero, "step 1")
    cluster.set_status(handle, active=2, ready=2)
    follower.wait_for("step 1")
    cluster.set_status(handle, active=1, ready=1, succeeded=1)
    assert launcher.status(handle) is JobState.RUNNING
    cluster.say(zero, "step 2", "done")
    cluster.close_log(zero)
    cluster.end(handle, "Complete", "CompletionsReached", succeeded=2)
    assert [line for line in follower.result() if "waiting" not in line] == [
        "step 1", "step 2", "done",
    ]  # fmt: skip
    assert launcher.status(handle) is JobState.SUCCEEDED
    assert why(launcher, handle) == ""


def test_a_pod_that_the_autoscaler_took_is_replaced(
    launcher: KubernetesLauncher, cluster: FakeCluster, job: StageJob
) -> None:
    """apache/airflow 56693: a 404 of the pod is no failure. And 18070: more pods than expected."""
    handle = launcher.submit(job)
    follower = Follower(launcher, handle)
    cluster.set_status(handle, active=2, ready=2)
    first = cluster.add_pod(handle, 0, "aaaaa")
    cluster.say(first, "first pod")
    follower.wait_for("first pod")
    cluster.lose_pod(first)
    cluster.set_status(handle, active=1, ready=1)
    with cluster.changed:  # who saw the stale pod alone would follow its log, which stays open
        stale = cluster.add_pod(handle, 0, "ccccc", phase="Failed")
        cluster.objects["pods", stale]["metadata"]["creationTimestamp"] = "2020-01-01T00:00:00Z"
        second = cluster.add_pod(handle, 0, "bbbbb")
    cluster.say(stale, "stale pod")
    cluster.say(second, "resumed at step 7")
    follower.wait_for("resumed")
    cluster.close_log(second)
    cluster.end(handle, "Complete", "CompletionsReached", succeeded=2)
    assert "stale pod" not in follower.result()


def test_a_broken_log_goes_on_where_it_was_whatever_the_clocks_say(
    launcher: KubernetesLauncher, cluster: FakeCluster, job: StageJob
) -> None:
    """apache/airflow 71567: the log was replayed at every look."""
    cluster.skew = timedelta(hours=-5)
    handle = launcher.submit(job)
    cluster.set_status(handle, active=2, ready=2)
    zero = cluster.add_pod(handle, 0, "aaaaa")
    cluster.log_cuts = [2, 3, 0]
    cluster.say(zero, *(f"step {n}" for n in range(5)))
    follower = Follower(launcher, handle)
    follower.wait_for("step 4")
    cluster.close_log(zero)
    cluster.end(handle, "Complete", "CompletionsReached", succeeded=2)
    assert follower.result() == [f"step {n}" for n in range(5)]
    assert any("sinceSeconds" in request for request in cluster.requests)


def test_an_hour_in_the_queue_is_no_error_and_costs_few_requests(
    launcher: KubernetesLauncher, cluster: FakeCluster, job: StageJob
) -> None:
    launcher.cluster = launcher.cluster.model_copy(update={"queue": "research"})
    handle = launcher.submit(job)
    assert cluster.job(handle)["spec"]["suspend"] is True
    cluster.watch_speed = 4000.0
    follower = Follower(launcher, handle)
    wait_until(lambda: cluster.watched_s > 3600)
    assert launcher.status(handle) is JobState.WAITING
    assert follower.is_alive()
    looked = [r for r in cluster.requests if "/pods" in r]
    assert looked == []
    cluster.watch_speed = 1.0
    cluster.suspend(handle, False)
    follower.wait_for("its pods do not exist yet")
    assert follower.lines[0] == "waiting: in Kueue's queue research, not admitted yet"
    assert len(follower.lines) == 2
    cluster.end(handle, "Complete", "CompletionsReached", succeeded=2)
    follower.result()


def test_what_kueue_says_is_told(
    launcher: KubernetesLauncher, cluster: FakeCluster, job: StageJob
) -> None:
    launcher.cluster = launcher.cluster.model_copy(update={"queue": "research"})
    handle = launcher.submit(job)
    uid = handle.split("/")[1]
    message = "couldn't assign flavors to pod set main: insufficient unused quota"
    quota = {"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": message}
    workload = {
        "metadata": {"name": "job-x", "labels": {WORKLOAD_OF: uid}},
        "status": {"conditions": [quota]},
    }
    other = {"metadata": {"name": "job-y", "labels": {WORKLOAD_OF: "of-another"}}}
    follower = Follower(launcher, handle)
    follower.wait_for("waiting: in Kueue's queue research, not admitted yet")
    with cluster.changed:
        cluster.create("workloads", "sailyard", other)
        cluster.create("workloads", "sailyard", workload)
    follower.wait_for(f"waiting: in Kueue's queue research, not admitted yet: {message}")
    cluster.suspend(handle, False)
    cluster.end(handle, "Complete", "CompletionsReached", succeeded=2)
    follower.result()
    assert {right[:3] for right in QUEUE_RIGHTS} <= cluster.used


@pytest.mark.parametrize("missing", ["the right", "Kueue"])
def test_a_queue_is_waited_in_though_kueue_says_nothing(
    launcher: KubernetesLauncher, cluster: FakeCluster, job: StageJob, missing: str
) -> None:
    launcher.cluster = launcher.cluster.model_copy(update={"queue": "research"})
    handle = launcher.submit(job)
    if missing == "Kueue":
        cluster.apis = BUILT_IN
    else:
        cluster.denied = {right[:3] for right in QUEUE_RIGHTS}
    follower = Follower(launcher, handle)
    follower.wait_for("waiting: in Kueue's queue research, not admitted yet")
    wait_until(lambda: sum("/workloads" in request for request in cluster.requests) > 2)
    assert follower.is_alive()
    cluster.end(handle, "Complete", "CompletionsReached", succeeded=2)
    assert len(follower.result()) == 1


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (
            {
                "containerStatuses": [
                    {
                        "name": "stage", "image": "i", "imageID": "", "ready": False,
                        "restartCount": 0,
                        "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no i"}},
                    }
                ]
            },
            "ImagePullBackOff: no i",
        ),
        (
            {
                "conditions": [
                    {
                        "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                        "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
                    }
                ]
            },
            "Insufficient nvidia.com/gpu",
        ),
    ],
)  # fmt: skip
def test_what_a_pod_waits_for_is_told_although_the_other_runs(
    launcher: KubernetesLauncher,
    cluster: FakeCluster,
    job: StageJob,
    status: dict[str, Any],
    told: str,
) -> None:
    handle = launcher.submit(job)
    cluster.set_status(handle, active=2, ready=1)
    cluster.add_pod(handle, 0, "aaaaa")
    cluster.add_pod(handle, 1, "bbbbb", phase="Pending", **status)
    follower = Follower(launcher, handle)
    follower.wait_for(told)
    assert launcher.status(handle) is JobState.WAITING
    launcher.cancel(handle, 120.0)
    follower.result()
    assert launcher.status(handle) is JobState.INTERRUPTED


@pytest.mark.parametrize(
    ("reason", "message", "told"),
    [
        ("DeadlineExceeded", "too long", "SAILYARD_CLUSTER_DEADLINE_SECONDS"),
        ("BackoffLimitExceeded", "limit", "SAILYARD_CLUSTER_MEMORY"),
        ("PodFailurePolicy", "exit code 1", "PodFailurePolicy: exit code 1"),
    ],
)
def test_failures_say_why(
    launcher: KubernetesLauncher,
    cluster: FakeCluster,
    job: StageJob,
    reason: str,
    message: str,
    told: str,
) -> None:
    handle = launcher.submit(job)
    if reason == "BackoffLimitExceeded":
        ended = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
        status = {"name": "stage", "image": "i", "imageID": "", "ready": False, "restartCount": 0}
        cluster.add_pod(
            handle, 1, "aaaaa", phase="Failed", containerStatuses=[{**status, "state": ended}]
        )
    cluster.end(handle, "Failed", reason, message)
    assert launcher.status(handle) is JobState.FAILED
    assert told in why(launcher, handle)


# --- an API server that misbehaves -------------------------------------------------------------


def test_429_500_and_resets_are_lived_through(
    launcher: KubernetesLauncher, cluster: FakeCluster, job: StageJob
) -> None:
    handle = launcher.submit(job)
    cluster.faults = [(429, {"Retry-After": "1"}), 500, "reset"]
    begun = time.monotonic()
    assert launcher.status(handle) is JobState.WAITING
    assert cluster.faults == []
    assert time.monotonic() - begun > 1.0


def test_a_watch_lives_through_hiccups_and_410(
    launcher: KubernetesLauncher, cluster: FakeCluster, job: StageJob
) -> None:
    handle = launcher.submit(job)
    follower = Follower(launcher, handle)
    follower.wait_for("its pods")
    cluster.watch_speed = 1e6  # every watch ends at once: what follows meets new ones
    cluster.faults = ["reset", 503, (429, {"Retry-After": "1"}), "reset", 500]
    wait_until(lambda: cluster.faults == [])
    cluster.forget_events()
    gone = len(cluster.requests)
    wait_until(lambda: sum("watch=" in r for r in cluster.requests[gone:]) > 2)
    assert follower.is_alive()
    cluster.watch_speed = 1.0
    cluster.end(handle, "Complete", "CompletionsReached", succeeded=2)
    follower.result()
    assert launcher.status(handle) is JobState.SUCCEEDED


def test_an_api_that_stays_away_is_an_error_in_the_end(
    launcher: KubernetesLauncher, cluster: FakeCluster
) -> None:
    cluster.faults = [503] * 20
    with pytest.raises(ApiException, match="503"):
        launcher.cancel("a/b", grace_s=1.2)


# --- rights --------------------------------------------------------------------------------------


def _joined_anew(launcher: KubernetesLauncher, cluster: FakeCluster, job: StageJob) -> None:
    cluster.end(launcher.submit(job), "Failed", "BackoffLimitExceeded")
    launcher.submit(job)


def _stale_service(launcher: KubernetesLauncher, cluster: FakeCluster, job: StageJob) -> None:
    first = launcher.submit(job)
    cluster.write("jobs", cluster.job(first), "DELETED")
    launcher.submit(job)


def _submit(launcher: KubernetesLauncher, cluster: FakeCluster, job: StageJob) -> None:
    launcher.submit(job)


def _follow(launcher: KubernetesLauncher, cluster: FakeCluster, job: StageJob) -> None:
    handle = launcher.submit(job)
    zero = cluster.add_pod(handle, 0, "aaaaa")
    cluster.say(zero, "hello")
    follower = Follower(launcher, handle)
    follower.wait_for("hello")
    cluster.close_log(zero)
    cluster.end(handle, "Complete", "CompletionsReached", succeeded=2)
    follower.result()


def _reading(launcher: KubernetesLauncher, cluster: FakeCluster, job: StageJob) -> None:
    handle = launcher.submit(job)
    cluster.say(cluster.add_pod(handle, 0, "aaaaa"), "hello")
    for line in launcher.logs(handle):
        if "may not be read" in line:
            raise ApiException(status=403, reason=line)
        if line == "hello":
            return


def _watching(launcher: KubernetesLauncher, cluster: FakeCluster, job: StageJob) -> None:
    handle = launcher.submit(job)
    end = threading.Timer(100, cluster.end, (handle, "Complete", "CompletionsReached"))
    end.start()
    try:
        list(launcher.logs(handle))
    finally:
        end.cancel()


def _list_jobs(launcher: KubernetesLauncher, cluster: FakeCluster, job: StageJob) -> None:
    cluster_api.stage_jobs(cluster_api.connect(launcher.cluster), launcher.cluster)


CODE = {
    ("batch", "jobs", "create"): ("KubernetesLauncher.submit", _submit),
    ("batch", "jobs", "get"): ("KubernetesLauncher.submit, status", _submit),
    ("batch", "jobs", "list"): ("cluster_api.stage_jobs, for doctor --cluster", _list_jobs),
    ("batch", "jobs", "watch"): ("JobFollower._watch_job", _watching),
    ("batch", "jobs", "delete"): ("KubernetesLauncher.submit, cancel", _joined_anew),
    ("", "services", "create"): ("KubernetesLauncher.submit", _submit),
    ("", "services", "get"): ("KubernetesLauncher.submit, a later try", _stale_service),
    ("", "services", "delete"): ("KubernetesLauncher.submit, a later try", _stale_service),
    ("", "pods", "list"): ("JobFollower._follow_log", _reading),
    ("", "pods/log", "get"): ("JobFollower._read_log", _reading),
}
"""Right -> who uses it, and a way to make it do so."""


def test_every_right_has_code_and_every_code_its_right() -> None:
    assert {right[:3] for right in RIGHTS} == set(CODE)


@pytest.mark.parametrize("right", RIGHTS, ids=lambda right: f"{right.verb} {right.resource}")
def test_without_the_right_its_code_fails(
    launcher: KubernetesLauncher, cluster: FakeCluster, job: StageJob, right: Right
) -> None:
    cluster.denied = {right[:3]}
    use = CODE[right[:3]][1]
    begun = time.monotonic()
    with pytest.raises(
        (ApiException, AsyncApiException), match=f"may not {right.verb} {right.resource}"
    ):
        use(launcher, cluster, job)
    assert time.monotonic() - begun < 120, "a refusal is no reason to wait"


def test_no_other_right_is_used(
    launcher: KubernetesLauncher, cluster: FakeCluster, job: StageJob
) -> None:
    _follow(launcher, cluster, job)
    _joined_anew(launcher, cluster, job)
    _stale_service(launcher, cluster, StageJob("alignment.fine_grained", job.run_id))
    _list_jobs(launcher, cluster, job)
    assert cluster.used == {right[:3] for right in RIGHTS}


# --- sailyard doctor --cluster -----------------------------------------------------------------


def doctor(*arguments: str) -> str:
    from sailyard.cli import commands

    return CliRunner().invoke(commands, ["doctor", "--cluster", *arguments]).output


def test_doctor_lists_leftovers_and_removes_only_those(
    launcher: KubernetesLauncher, cluster: FakeCluster, job: StageJob
) -> None:
    ended = launcher.submit(job)
    cluster.end(ended, "Failed", "BackoffLimitExceeded")
    done = launcher.submit(StageJob("alignment.fine_grained", job.run_id))
    stage = "alignment.fine_grained"
    result = StageResult(stage, "0" * 64, "finished", job.run_id)
    write_result(Yard().store, run_key(job.run_id, stage), result)
    alive = launcher.submit(StageJob("alignment.world_knowledge", job.run_id))
    labels = {**MANAGED_BY, "app.kubernetes.io/component": "migrations"}
    body = {"metadata": {"name": "of-the-chart", "labels": labels}, "spec": {"template": {}}}
    cluster.create("jobs", "sailyard", body)

    told = doctor()
    assert "all that launching takes" in told
    assert told.count("left over") == 2
    assert "of-the-chart" not in told
    assert cluster.has("jobs", ended)
    assert doctor("--remove-leftovers").count("; deleted") == 2
    assert [cluster.has("jobs", h) for h in (ended, done, alive, "of-the-chart")] == [
        False, False, True, True,
    ]  # fmt: skip


def test_doctor_names_the_right_that_is_missing(cluster: FakeCluster) -> None:
    cluster.denied = {("", "pods/log", "get")}
    assert "may not get pods/log (core) in namespace sailyard" in doctor()


def test_no_cluster_is_told_with_a_way_out(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="set KUBECONFIG"):
        KubernetesLauncher(ClusterSettings())


def test_sizes_of_the_test_stage() -> None:
    """What the tests above rest on."""
    assert load_run(create_run("2b")).pipeline.stage(STAGE).gpus == 8
