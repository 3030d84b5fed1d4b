"""The local launcher: live lines, honest states, and no process left behind."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import pytest

from operators.launchers import JobState, LocalLauncher, StageJob, make_launcher

Launch = Callable[[str], tuple[LocalLauncher, str]]


@pytest.fixture
def launch(stage_stand_in: Callable[[str], None]) -> Launch:
    """Start a stage that is any Python code; returns the launcher and the handle."""

    def start(code: str) -> tuple[LocalLauncher, str]:
        stage_stand_in(code)
        launcher = LocalLauncher()
        return launcher, launcher.submit(StageJob("curation.text", "run-1"))

    return start


def wait_until(condition: Callable[[], bool], timeout_s: float = 120.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_the_stage_is_run_by_the_one_command(launch: Launch) -> None:
    launcher, handle = launch("import sys; print(*sys.argv[1:])")
    assert list(launcher.logs(handle)) == ["-m sailyard stage run curation.text --run run-1"]


def test_lines_arrive_while_the_stage_runs(launch: Launch) -> None:
    launcher, handle = launch("import time; print('first'); time.sleep(600)")
    lines = launcher.logs(handle)
    assert next(lines) == "first"
    assert launcher.status(handle) is JobState.RUNNING
    launcher.cancel(handle, grace_s=1.0)
    assert list(lines) == []


def test_standard_error_and_broken_bytes_are_lines_too(launch: Launch) -> None:
    launcher, handle = launch(r"import os; os.write(2, b'caf\xe9\r\nlast')")
    assert list(launcher.logs(handle)) == ["caf\ufffd", "last"]
    assert launcher.status(handle) is JobState.SUCCEEDED


@pytest.mark.parametrize(
    ("code", "state"),
    [
        ("raise SystemExit(0)", JobState.SUCCEEDED),
        ("raise SystemExit(1)", JobState.FAILED),
        ("raise SystemExit(75)", JobState.INTERRUPTED),
        ("import os; os.kill(os.getpid(), 9)", JobState.INTERRUPTED),
    ],
)
def test_how_a_stage_ended(launch: Launch, code: str, state: JobState) -> None:
    launcher, handle = launch(code)
    assert list(launcher.logs(handle)) == []
    assert launcher.status(handle) is state


def test_cancel_ends_every_process_of_the_stage(launch: Launch) -> None:
    launcher, handle = launch(
        "import subprocess, time;"
        "print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    )
    child = int(next(launcher.logs(handle)))
    launcher.cancel(handle, grace_s=2.0)
    assert wait_until(lambda: gone(child) and gone(int(handle)))
    assert launcher.status(handle) is JobState.INTERRUPTED


def test_cancel_is_by_force_when_the_stage_will_not_end(launch: Launch) -> None:
    launcher, handle = launch(
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('on'); time.sleep(600)"
    )
    assert next(launcher.logs(handle)) == "on"
    started = time.monotonic()
    launcher.cancel(handle, grace_s=0.3)
    assert wait_until(lambda: gone(int(handle)))
    assert time.monotonic() - started < 120


def test_a_helper_that_outlives_its_stage_is_ended_and_does_not_hold_the_log(
    launch: Launch,
) -> None:
    launcher, handle = launch("import subprocess; print(subprocess.Popen(['sleep', '600']).pid)")
    (pid,) = map(int, launcher.logs(handle))
    assert wait_until(lambda: gone(pid))


def test_the_choice_of_launchers() -> None:
    assert isinstance(make_launcher("local"), LocalLauncher)
    with pytest.raises(ValueError, match="choose from: local, kubernetes"):
        make_launcher("slurm")
