"""The stage operator inside Airflow: runs, reuses, skips, resumes, and ends what it started."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException

from dags.sail_vl2 import dag
from operators.launchers import LocalLauncher, StageJob
from operators.stage_operator import StageInterrupted, StageOperator
from tests.operators.test_local_launcher import gone, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.airflow]

StandIn = Callable[[str], None]

# A stage that every recipe has, and one for mixtures of experts only.
TASKS = ["create_run", "curation.text", "pretraining.expert_calibration"]
DENSE = {"recipe": "micro", "overrides": ["world.num_text=40"]}


@pytest.fixture(scope="session")
def airflow_database() -> None:
    """Airflow's own tables, once a session."""
    subprocess.run(
        [sys.executable, "-m", "airflow", "db", "migrate"],
        check=True,
        capture_output=True,
        env=os.environ,
    )


def operator() -> StageOperator:
    return StageOperator(task_id="a", stage="curation.text", run="r", launcher="local")


def states(run: Any) -> dict[str, str]:
    return {ti.task_id: str(ti.state) for ti in run.get_task_instances()}


def outcome(run: Any, task_id: str) -> dict[str, Any]:
    (instance,) = (ti for ti in run.get_task_instances() if ti.task_id == task_id)
    return dict(instance.xcom_pull(task_ids=task_id))


@pytest.mark.usefixtures("airflow_database")
def test_a_stage_runs_once_and_is_reused_without_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    part = dag.partial_subset(TASKS, include_upstream=False)
    first = part.test(run_conf=DENSE)
    assert states(first) == dict(zip(TASKS, ("success", "success", "skipped"), strict=True))

    def refuse(self: LocalLauncher, job: StageJob) -> str:
        raise AssertionError(f"{job.stage} was launched although it is finished")

    monkeypatch.setattr(LocalLauncher, "submit", refuse)
    second = part.test(run_conf=DENSE)
    assert states(second) == states(first)
    made, reused = outcome(first, "curation.text"), outcome(second, "curation.text")
    assert (made["cached"], reused["cached"]) == (False, True)
    assert made["outputs"] == reused["outputs"]


def test_a_stage_that_was_stopped_is_to_be_tried_again(stage_stand_in: StandIn) -> None:
    stage_stand_in("raise SystemExit(75)")
    assert operator().retries > 0
    with pytest.raises(StageInterrupted, match="next try resumes"):
        operator()._launch(LocalLauncher())


def test_a_stage_that_failed_is_not_tried_again(stage_stand_in: StandIn) -> None:
    stage_stand_in("raise SystemExit(1)")
    with pytest.raises(AirflowFailException, match=r"curation\.text failed"):
        operator()._launch(LocalLauncher())


def test_killing_the_task_ends_the_stages_processes(
    stage_stand_in: StandIn, tmp_path: Path
) -> None:
    note = tmp_path / "pid"
    stage_stand_in(
        "import pathlib, subprocess, time;"
        "child = subprocess.Popen(['sleep', '600']);"
        f"pathlib.Path({str(note)!r}).write_text(str(child.pid)); time.sleep(600)"
    )
    running = operator()
    errors: list[BaseException] = []

    def launch() -> None:
        try:
            running._launch(LocalLauncher())
        except StageInterrupted as error:
            errors.append(error)

    thread = threading.Thread(target=launch)
    thread.start()
    while not (note.exists() and note.read_text()):
        time.sleep(0.02)
    running.on_kill()
    thread.join(120)
    assert len(errors) == 1
    # A process closes its files, and so the log, a little before it is gone.
    assert wait_until(lambda: gone(int(note.read_text())))
