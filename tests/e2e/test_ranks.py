"""A stage as two ranks under the contract: one result, one log, one checkpoint for both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sailyard import runs
from sailyard.processes import descendants
from sailyard.settings import Settings
from sailyard.stage import EXIT_OK, EXIT_RESUME
from sailyard.yard import Yard

STAGE = "bootstrap.language"
CHANGES = [f"{STAGE}.{change}" for change in ("max_steps=100", "checkpoint_every=4", "threads=1")]

pytestmark = pytest.mark.slow


@pytest.fixture
def yard(tmp_path: Path) -> Yard:
    return Yard(Settings(home=tmp_path / "home", ranks=2))


def start(yard: Yard, run_id: str, stage: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "sailyard", "stage", "run", stage, "--run", run_id]
    return subprocess.Popen(command, env={**os.environ, **yard.settings.environment()})


def test_two_ranks_stop_together_go_on_and_leave_one_result(yard: Yard) -> None:
    run_id = runs.create_run("micro", CHANGES, yard=yard)
    # Declared for one process: that two are allowed changes nothing.
    assert start(yard, run_id, "curation.text").wait() == EXIT_OK

    process = start(yard, run_id, STAGE)
    pointers = Path(yard.settings.store.removeprefix("file://")) / "checkpoints"
    deadline = time.monotonic() + 300
    while not list(pointers.glob("*/*.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == EXIT_RESUME
    deadline = time.monotonic() + 60
    while left := [pid for pid in family if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"processes {left} live on"
        time.sleep(0.1)
    stopped = runs.stage_result(run_id, STAGE, yard)
    assert stopped is not None
    assert stopped.status == "stopped"

    assert start(yard, run_id, STAGE).wait() == EXIT_OK
    finished = runs.stage_result(run_id, STAGE, yard)
    assert finished is not None
    assert finished.finished
    assert finished.metrics["ranks"] == 2
    assert not [path for path in pointers.rglob("*") if path.is_file()]
    assert not list(yard.folder("work").iterdir())
    # Asked again, both ranks see that there is nothing to do.
    assert start(yard, run_id, STAGE).wait() == EXIT_OK


def test_a_rank_that_is_killed_interrupts_the_stage(yard: Yard) -> None:
    run_id = runs.create_run("micro", CHANGES, yard=yard)
    assert start(yard, run_id, "curation.text").wait() == EXIT_OK
    process = start(yard, run_id, STAGE)
    pointers = Path(yard.settings.store.removeprefix("file://")) / "checkpoints"
    while not list(pointers.glob("*/*.json")):
        assert process.poll() is None
        time.sleep(0.05)
    victim = next(pid for pid in descendants(process.pid) if _is_follower(pid))
    os.kill(victim, signal.SIGKILL)
    assert process.wait(300) != EXIT_OK
    assert start(yard, run_id, STAGE).wait() == EXIT_OK


def _is_follower(pid: int) -> bool:
    try:
        return b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
