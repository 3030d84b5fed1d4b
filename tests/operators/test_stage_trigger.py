"""The stage operator on a cluster: it defers, and its trigger follows the Job."""

from __future__ import annotations

import asyncio
import importlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException, TaskDeferred
from airflow.triggers.base import TaskSuccessEvent, TriggerEvent

from dags.sail_vl2 import build_dag
from operators.launchers import kubernetes, kubernetes_follow
from operators.stage_operator import StageInterrupted, StageOperator
from operators.stage_trigger import StageTrigger
from sailyard.runs import create_run, log_key, run_key, stage_result
from sailyard.stage.results import StageResult, write_result
from sailyard.yard import Yard
from tests.operators.fake_cluster import FakeCluster, serve

pytestmark = [pytest.mark.slow, pytest.mark.airflow]

STAGE = "curation.text"
CONTEXT: Any = {"ti": SimpleNamespace(xcom_push=lambda *args: None)}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    monkeypatch.setattr(kubernetes_follow, "POLL_SECONDS", 0.04)
    monkeypatch.setattr(kubernetes_follow, "DRAIN_SECONDS", 120.0)
    # The store of these tests lies here, where the test runs what a pod would.
    monkeypatch.setattr(kubernetes, "check_reachable", lambda settings: None)
    fake = FakeCluster()
    with serve(fake, tmp_path) as kubeconfig:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        monkeypatch.setenv("SAILYARD_CLUSTER_IMAGE", "example/train")
        monkeypatch.setenv("SAILYARD_CLUSTER_ENV_SECRET", "keys")
        yield fake


@pytest.fixture
def operator() -> StageOperator:
    run = create_run("micro", ["world.num_text=40"])
    return StageOperator(task_id="a", stage=STAGE, run=run, launcher="kubernetes")


def deferred(operator: StageOperator) -> StageTrigger:
    """What a triggerer makes of the task: only what was serialized reaches it."""
    with pytest.raises(TaskDeferred) as caught:
        operator.execute(CONTEXT)
    assert caught.value.method_name == "resume"
    path, arguments = caught.value.trigger.serialize()
    module, name = path.rsplit(".", 1)
    trigger = getattr(importlib.import_module(module), name)(**arguments)
    assert isinstance(trigger, StageTrigger)
    return trigger


def raw_event(trigger: StageTrigger) -> TriggerEvent:
    async def first() -> TriggerEvent:
        async for event in trigger.run():
            return event
        raise AssertionError("no event")

    return asyncio.run(asyncio.wait_for(first(), 120))


def event_of(trigger: StageTrigger) -> dict[str, Any]:
    return dict(raw_event(trigger).payload)


def run_the_stage(operator: StageOperator) -> str:
    """What the pod does; returns its output."""
    command = [sys.executable, "-m", "sailyard", "stage", "run", STAGE, "--run", operator.run]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_a_stage_is_waited_for_elsewhere_and_its_result_taken_from_the_store(
    cluster: FakeCluster, operator: StageOperator, capsys: pytest.CaptureFixture[str]
) -> None:
    trigger = deferred(operator)
    assert cluster.job(trigger.handle)["spec"]["completions"] == 1
    pod = cluster.add_pod(trigger.handle, 0, "aaaaa")
    cluster.say(pod, *run_the_stage(operator).splitlines(), "the last line")
    cluster.close_log(pod)
    cluster.end(trigger.handle, "Complete", "CompletionsReached", succeeded=1)
    event = raw_event(trigger)
    assert isinstance(event, TaskSuccessEvent)
    assert "the last line" in capsys.readouterr().out
    assert event.xcoms is not None
    summary = event.xcoms["return_value"]
    assert isinstance(summary, dict)
    assert summary["outputs"]
    assert summary["cached"] is False
    # State first: a task that is tried again does not defer, and makes no request.
    before = len(cluster.requests)
    assert operator.execute(CONTEXT)["outputs"] == summary["outputs"]
    assert len(cluster.requests) == before


def test_a_result_that_cannot_be_read_is_asked_for_again_by_the_task(
    cluster: FakeCluster, operator: StageOperator
) -> None:
    trigger = deferred(operator)
    pod = cluster.add_pod(trigger.handle, 0, "aaaaa")
    cluster.say(pod, *run_the_stage(operator).splitlines())
    cluster.close_log(pod)
    cluster.end(trigger.handle, "Complete", "CompletionsReached", succeeded=1)
    store, key = Yard().store, run_key(operator.run, STAGE)
    whole = store.get(key)
    store.put(key, whole[:20])
    event = event_of(trigger)
    store.put(key, whole)
    assert event == {"state": "succeeded", "reason": "", "log_read": True}
    assert operator.resume(CONTEXT, event)["outputs"]


def test_the_dag_runs_on_a_cluster(cluster: FakeCluster) -> None:
    """Airflow's own deferral and resumption, with a thread for kubelet and Job controller."""
    subprocess.run([sys.executable, "-m", "airflow", "db", "migrate"], check=True)
    end = threading.Event()
    kubelet = threading.Thread(target=_run_jobs, args=(cluster, end))
    kubelet.start()
    try:
        # Airflow writes a run's conf into its DAG's own parameters: not into those of other tests.
        part = build_dag().partial_subset(["create_run", STAGE], include_upstream=False)
        conf = {"recipe": "micro", "overrides": ["world.num_text=41"], "launcher": "kubernetes"}
        run = part.test(run_conf=conf)
    finally:
        end.set()
        kubelet.join()
    assert {ti.task_id: str(ti.state) for ti in run.get_task_instances()} == {
        "create_run": "success",
        STAGE: "success",
    }
    (instance,) = (ti for ti in run.get_task_instances() if ti.task_id == STAGE)
    assert instance.xcom_pull(task_ids=STAGE)["cached"] is False
    assert sum(request.startswith("POST") for request in cluster.requests) == 1


def _run_jobs(cluster: FakeCluster, end: threading.Event) -> None:
    """Runs each Job's own command, on this machine."""
    done: set[str] = set()
    while not end.wait(0.05):
        for (kind, name), job in list(cluster.objects.items()):
            if kind != "jobs" or name in done:
                continue
            done.add(name)
            pod = cluster.add_pod(name, 0, "aaaaa")
            cluster.set_status(name, active=1, ready=1)
            (container,) = job["spec"]["template"]["spec"]["containers"]
            command = [sys.executable, *container["command"][1:]]
            ran = subprocess.run(command, capture_output=True, text=True)
            cluster.say(pod, *ran.stdout.splitlines())
            cluster.close_log(pod)
            assert ran.returncode == 0, ran.stderr
            cluster.end(name, "Complete", "CompletionsReached", succeeded=1)


def test_a_triggerer_that_is_ended_leaves_the_job_alone_and_a_kill_does_not(
    cluster: FakeCluster, operator: StageOperator
) -> None:
    """apache/airflow 62398 and 40018."""
    trigger = deferred(operator)

    async def shut_down() -> None:
        task = asyncio.create_task(anext(aiter(trigger.run())))  # type: ignore[arg-type]
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await trigger.cleanup()

    asyncio.run(shut_down())
    assert cluster.has("jobs", trigger.handle)
    # The next one finds it, and so does a scheduler that lost the task.
    assert deferred(operator).handle == trigger.handle
    asyncio.run(trigger.on_kill())
    assert not cluster.has("jobs", trigger.handle)
    assert event_of(trigger)["state"] == "interrupted"


def test_a_log_that_was_lost_with_its_pod_comes_from_the_store(
    cluster: FakeCluster, operator: StageOperator, capsys: pytest.CaptureFixture[str]
) -> None:
    trigger = deferred(operator)
    write_result(
        Yard().store,
        run_key(operator.run, STAGE),
        StageResult(STAGE, "0" * 64, "failed", operator.run, error="there is no such teacher"),
    )
    Yard().store.put(log_key(operator.run, STAGE), b"first line\nthere is no such teacher\n")
    cluster.end(trigger.handle, "Failed", "PodFailurePolicy", "exit code 1")
    event = event_of(trigger)
    assert event["log_read"] is False
    with pytest.raises(AirflowFailException, match="there is no such teacher"):
        operator.resume(CONTEXT, event)
    assert "first line" in capsys.readouterr().out


def test_a_job_that_went_away_is_tried_again_and_one_past_its_deadline_is_not(
    cluster: FakeCluster, operator: StageOperator
) -> None:
    trigger = deferred(operator)
    cluster.write("jobs", cluster.job(trigger.handle), "DELETED")
    with pytest.raises(StageInterrupted, match="next try resumes"):
        operator.resume(CONTEXT, event_of(trigger))
    assert stage_result(operator.run, STAGE) is None
    second = deferred(operator)
    cluster.end(second.handle, "Failed", "DeadlineExceeded")
    with pytest.raises(AirflowFailException, match="SAILYARD_CLUSTER_DEADLINE_SECONDS"):
        operator.resume(CONTEXT, event_of(second))
