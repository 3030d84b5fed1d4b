"""The DAGs under Airflow's own scheduler: live logs, links, cancelling, promotion by approval."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from operators.local_airflow import LocalAirflow
from operators.processes import Services, marked_processes, tail
from sailyard.runs import stage_state
from sailyard.settings import Settings
from sailyard.yard import Yard

pytestmark = [pytest.mark.slow, pytest.mark.airflow, pytest.mark.timeout(1500)]

DAGS = Path(__file__).parents[2] / "dags"
TASK = "curation.text"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("airflow")


@pytest.fixture(scope="module")
def airflow(home: Path) -> Iterator[LocalAirflow]:
    services = Services(home)
    started = LocalAirflow(home, DAGS, services)
    try:
        started.start("sail_vl2")
        yield started
    finally:
        started.stop()
        services.stop()
    assert marked_processes(home) == []


@pytest.fixture
def yard(home: Path) -> Yard:
    return Yard(Settings(home=home))


def wait_for(what: str, ask: Callable[[], Any], timeout_s: float = 300.0) -> Any:
    """The first true answer."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if answer := ask():
            return answer
        time.sleep(0.3)
    raise AssertionError(f"waited {timeout_s:.0f} s in vain for {what}")


def task_states(airflow: LocalAirflow, dag_id: str, run_id: str) -> dict[str, str]:
    instances = airflow.client.task_instances(dag_id, run_id)
    return {instance["task_id"]: instance["state"] for instance in instances}


def test_cancelling_a_task_ends_its_processes(airflow: LocalAirflow, yard: Yard) -> None:
    client = airflow.client
    client.set_paused("sail_vl2", False)
    conf = {"recipe": "micro", "overrides": ["world.num_text=5000000"]}
    run_id = client.trigger("sail_vl2", conf)
    path = f"/api/v2/dags/sail_vl2/dagRuns/{run_id}/taskInstances/{TASK}"

    yard_run = wait_for("the run", lambda: client.returned("sail_vl2", run_id, "create_run"))
    # Its first line of progress shows that the stage is at work and that Airflow shows it live.
    wait_for("a live log", lambda: f"{TASK} 1/" in log_of(airflow, run_id))
    assert task_states(airflow, "sail_vl2", run_id)[TASK] == "running"
    links = client.call("GET", f"{path}/links")["extra_links"]
    assert links["Lineage"].endswith(f"/lineage?run={yard_run}&stage={TASK}")

    (pid,) = (state.info.pid for state in stage_state(yard_run, yard) if state.stage == TASK)
    family = [psutil.Process(pid), psutil.Process(pid).parent()]
    client.call("PATCH", path, {"new_state": "failed"})
    gone, alive = psutil.wait_procs([p for p in family if p], timeout=180)
    assert not alive
    assert len(gone) == 2
    client.fail_run("sail_vl2", run_id)


def finished_tasks(airflow: LocalAirflow) -> str:
    """The scheduler's own lines on tasks whose process it saw end."""
    lines = (airflow.logs / "scheduler.log").read_text(errors="replace").splitlines()
    return "\n".join(line for line in lines if "TaskInstance Finished" in line)


def log_of(airflow: LocalAirflow, run_id: str) -> str:
    if task_states(airflow, "sail_vl2", run_id)[TASK] != "running":
        return ""
    return airflow.client.task_log("sail_vl2", run_id, TASK, 1)


@pytest.mark.parametrize(
    ("answer", "served", "promote"),
    [("Reject", None, "skipped"), ("Approve", "micro:1", "success")],
)
def test_a_version_is_promoted_when_a_human_approves(
    airflow: LocalAirflow, yard: Yard, answer: str, served: str | None, promote: str
) -> None:
    yard.registry.register("micro", "c" * 64, metrics={"overall": 0.75})
    client = airflow.client
    client.set_paused("promote", False)
    run_id = client.trigger("promote", {"version": "micro:1", "reason": "looks good"})
    wait_for(
        "the question",
        lambda: task_states(airflow, "promote", run_id).get("approve") == "awaiting_input",
    )
    assert yard.registry.current("production") is None
    path = f"/api/v2/dags/promote/dagRuns/{run_id}/taskInstances/approve/-1/hitlDetails"
    question = client.call("GET", path)
    assert question["subject"] == "Promote micro:1 to production?"
    assert "| overall | 0.75 |" in question["body"]

    # Airflow fails a task that is queued again before the scheduler has noticed that its first
    # process ended. No human answers that fast.
    wait_for("the pause", lambda: f"task_id=approve, run_id={run_id}," in finished_tasks(airflow))
    client.answer_approval("promote", run_id, "approve", answer)
    wait_for("the end", lambda: client.run_state("promote", run_id) in ("success", "failed"))
    states = task_states(airflow, "promote", run_id)
    assert states["promote"] == promote, (
        states,
        client.task_log("promote", run_id, "approve", 1),
        tail(airflow.logs / "scheduler.log"),
    )
    current = yard.registry.current("production")
    assert (current.ref if current else None) == served
