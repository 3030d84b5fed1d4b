"""The stage contract in processes: kills, crashes, helpers left behind, secrets, shipped logs,
a real S3 store, and a database that is away."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from sailyard.lineage import queries, records
from sailyard.runs import results_of, reuse, stage_log, stage_result
from sailyard.settings import Settings
from sailyard.stage import EXIT_FAILED, EXIT_OK, EXIT_RESUME
from sailyard.stage.live import LiveRecorder
from sailyard.stage.runner import execute
from sailyard.yard import Yard
from tests.sailyard import stages
from tests.sailyard.stages import DRAW, TRAIN, open_run, read_output

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture
def yard() -> Iterator[Yard]:
    found = Yard()
    yield found
    found.database.close()


def start(stage: str, run_id: str = "run-1", **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", stages.__name__, run_id, stage],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=200)
    return output


def test_killed_at_any_moment_and_run_again_gives_the_undisturbed_result(yard: Yard) -> None:
    undisturbed = open_run(yard, "run-0")
    assert execute(yard, undisturbed, DRAW) == EXIT_OK
    assert execute(yard, undisturbed, TRAIN) == EXIT_OK
    expected = stage_result("run-0", TRAIN.name, yard)
    assert expected is not None
    digest = expected.outputs["weights"]
    weights = read_output(yard, digest, "weights.txt")
    for key in yard.store.list("stages/") + yard.store.list("artifacts/"):
        yard.store.delete(key)
    finish(start(DRAW.name))
    rng = random.Random(7)
    for step in (20, 30, 39):
        process = start(TRAIN.name, HANG_AT=str(step))  # there it waits for a kill that is late
        assert process.stdout is not None
        process.stdout.readline()  # it has begun
        time.sleep(rng.uniform(0, 0.25))
        os.kill(process.pid, signal.SIGKILL)
        finish(process)
        assert process.returncode == -signal.SIGKILL
    output = finish(process := start(TRAIN.name))
    assert process.returncode == 0
    assert "finished" in output
    result = stage_result("run-1", TRAIN.name, yard)
    assert result is not None
    assert result.outputs["weights"] == digest
    assert read_output(yard, result.outputs["weights"], "weights.txt") == weights
    row = queries.stage_run(yard.database, "run-1", TRAIN.name)
    assert row is not None
    assert (row.status, row.cached) == ("finished", False)
    kinds = [event.kind for event in queries.events(yard.database, "run-1")]
    assert kinds.count("stage lost") >= 1
    series = queries.metric_series(yard.database, "run-1", TRAIN.name)["first"]
    assert series == queries.metric_series(yard.database, "run-0", TRAIN.name)["first"]


def test_a_killed_child_is_reported_by_its_supervisor(yard: Yard) -> None:
    process = start("curation.run_out_of_memory")
    output = finish(process)
    assert process.returncode == -signal.SIGKILL
    assert "killed by SIGKILL, perhaps for lack of memory" in output
    result = stage_result("run-1", "curation.run_out_of_memory", yard)
    assert result is not None
    assert result.status == "lost"
    row = queries.stage_run(yard.database, "run-1", "curation.run_out_of_memory")
    assert row is not None
    assert row.status == "lost"
    assert "about to be killed" in stage_log("run-1", "curation.run_out_of_memory", yard=yard)


def test_a_process_that_ends_at_once_does_not_go_on_saying_running(yard: Yard) -> None:
    output = finish(process := start("curation.end_at_once"))
    assert process.returncode == EXIT_FAILED
    assert "where it hung" in output
    assert "ended at once with status 1" in output
    result = stage_result("run-1", "curation.end_at_once", yard)
    assert result is not None
    assert result.status == "lost"
    row = queries.stage_run(yard.database, "run-1", "curation.end_at_once")
    assert row is not None
    assert row.status == "lost"


def test_a_crash_in_native_code_is_a_failure_with_its_log(yard: Yard) -> None:
    process = start("curation.crash")
    output = finish(process)
    assert process.returncode == EXIT_FAILED
    assert "killed by SIGSEGV" in output
    log = stage_log("run-1", "curation.crash", yard=yard)
    assert "about to crash" in log
    assert "killed by SIGSEGV" in log


def test_secrets_are_kept_out_of_logs_and_records(yard: Yard) -> None:
    process = start(
        "curation.fail", SECRET="hunter2hunter2", SAILYARD_S3_SECRET_KEY="hunter2hunter2"
    )
    output = finish(process)
    assert process.returncode == EXIT_FAILED
    assert "the password is ***" in output
    everything = output + stage_log("run-1", "curation.fail", yard=yard)
    everything += json.dumps([str(row) for row in queries.stage_runs(yard.database, "run-1")])
    for key in yard.store.list("runs/"):
        everything += yard.store.get(key).decode()
    assert "hunter2" not in everything


def test_a_helper_left_behind_is_ended_and_holds_nothing_up(yard: Yard) -> None:
    process = start("curation.leave_helper")
    finish(process)
    assert process.returncode == EXIT_OK
    result = stage_result("run-1", "curation.leave_helper", yard)
    assert result is not None
    pid = int(read_output(yard, result.outputs["weights"], "pid.txt"))
    assert not Path(f"/proc/{pid}").exists()


def test_the_log_is_shipped_while_the_stage_runs(yard: Yard) -> None:
    process = start("curation.linger")
    try:
        deadline = time.monotonic() + 120
        while "helpers" not in stage_log("run-1", "curation.linger", yard=yard):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        helpers = json.loads(
            stage_log("run-1", "curation.linger", yard=yard).split("helpers ")[1].splitlines()[0]
        )
        process.terminate()
        finish(process)
        assert process.returncode == EXIT_RESUME
        assert not [pid for pid in helpers if Path(f"/proc/{pid}").exists()]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_two_processes_on_one_result_build_it_once(yard: Yard) -> None:
    finish(start(DRAW.name))
    processes = [start(TRAIN.name, run_id) for run_id in ("run-1", "run-2")]
    outputs = [finish(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("cached" in output for output in outputs) == 1
    rows = [queries.stage_run(yard.database, f"run-{i}", TRAIN.name) for i in (1, 2)]
    assert sorted(row.cached for row in rows if row) == [False, True]


def test_the_contract_holds_on_s3(s3_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    yard = Yard(s3_settings)
    run = open_run(yard)
    assert execute(yard, run, DRAW) == EXIT_OK
    monkeypatch.setenv("STOP_AT", "12")
    assert execute(yard, run, TRAIN) == EXIT_RESUME
    assert execute(yard, run, TRAIN) == EXIT_OK
    result = stage_result(run.id, TRAIN.name, yard)
    assert result is not None
    assert len(read_output(yard, result.outputs["weights"], "weights.txt")) == 64
    assert yard.store.list("checkpoints/") == []
    again = open_run(yard, "run-2")
    assert reuse(yard, again, DRAW.name, results_of(yard, again)) is not None
    yard.database.close()


def test_points_wait_for_a_database_that_is_away(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(yard)
    row = records.start_stage(yard.database, run.id, TRAIN.name, "k", {}, resumes=False)
    recorder = LiveRecorder(yard.database, row, TRAIN.name, None)
    beat, failures = records.beat, 0

    def away(*arguments: object) -> None:
        nonlocal failures
        failures += 1
        if failures <= 2:
            raise OSError("the server closed the connection")
        beat(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(records, "beat", away)
    recorder.start()
    for step in range(3):
        recorder.metric(step, {"loss": float(step)})
        recorder.flush()
    recorder.close()
    series = queries.metric_series(yard.database, run.id, TRAIN.name)
    assert series["loss"] == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert failures >= 3
