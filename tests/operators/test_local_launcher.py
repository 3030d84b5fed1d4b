"""The local launcher: live lines, honest states, and no process left behind."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import psutil
import pytest

from operators.launchers import JobState, LocalLauncher, StageJob, make_launcher
from operators.launchers.local import stage_command

# Two children: one in the stage's own group, one that opened a session of its own.
FAMILY = """
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
near = subprocess.Popen(sleep)
far = subprocess.Popen(sleep, start_new_session=True)
print(near.pid, far.pid, flush=True)
time.sleep(60)
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
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


def test_lines_arrive_while_the_stage_runs() -> None:
    launcher = LocalLauncher()
    handle = launcher.start(python("import time; print('first'); time.sleep(60)"))
    lines = launcher.logs(handle)
    assert next(lines) == "first"
    assert launcher.status(handle) is JobState.RUNNING
    launcher.cancel(handle, grace_s=1.0)
    assert list(lines) == []


def test_standard_error_and_broken_bytes_are_lines_too() -> None:
    launcher = LocalLauncher()
    code = r"import os; os.write(2, b'caf\xe9\r\nlast'); raise SystemExit(0)"
    handle = launcher.start(python(code))
    assert list(launcher.logs(handle)) == ["caf�", "last"]
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
def test_how_a_stage_ended(code: str, state: JobState) -> None:
    launcher = LocalLauncher()
    handle = launcher.start(python(code))
    assert list(launcher.logs(handle)) == []
    assert launcher.status(handle) is state


def test_cancel_ends_every_process_of_the_stage() -> None:
    launcher = LocalLauncher()
    handle = launcher.start(python(FAMILY))
    near, far = map(int, next(launcher.logs(handle)).split())
    launcher.cancel(handle, grace_s=2.0)
    assert wait_until(lambda: gone(near) and gone(far) and gone(int(handle)))
    assert launcher.status(handle) is JobState.INTERRUPTED


def test_cancel_is_by_force_when_the_stage_will_not_end() -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('on'); time.sleep(60)"
    launcher = LocalLauncher()
    handle = launcher.start(python(code))
    assert next(launcher.logs(handle)) == "on"
    started = time.monotonic()
    launcher.cancel(handle, grace_s=0.3)
    assert wait_until(lambda: gone(int(handle)))
    assert time.monotonic() - started < 5.0


def test_a_helper_that_outlives_its_stage_is_ended_and_does_not_hold_the_log() -> None:
    code = (
        "import subprocess, sys;"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print(p.pid)"
    )
    launcher = LocalLauncher()
    handle = launcher.start(python(code))
    (pid,) = map(int, launcher.logs(handle))
    assert wait_until(lambda: gone(pid))


def test_the_command_and_the_choice_of_launchers() -> None:
    job = StageJob("alignment.warmup", "run-1", force=True)
    assert stage_command(job)[1:] == [
        *("-m", "sailyard", "stage", "run", "alignment.warmup", "--run", "run-1", "--force")
    ]
    assert isinstance(make_launcher("local"), LocalLauncher)
    with pytest.raises(ValueError, match="choose from: local"):
        make_launcher("slurm")
