"""Stages as subprocesses of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress

import psutil

from operators.launchers.base import JobState, StageJob
from operators.processes import end_processes
from sailyard.stage.errors import EXIT_OK, EXIT_RESUME


def stage_command(job: StageJob) -> list[str]:
    """The one command inside every process, pod and rank."""
    command = [sys.executable, "-m", "sailyard", "stage", "run", job.stage, "--run", job.run_id]
    return [*command, "--force"] if job.force else command


class LocalLauncher:
    """Runs each stage in a session of its own, so that it ends as a whole."""

    def __init__(self) -> None:
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def submit(self, job: StageJob) -> str:
        """Start ``sailyard stage run``; the handle is its process id."""
        return self.start(stage_command(job))

    def start(self, command: list[str]) -> str:
        """Start any command the way a stage is started."""
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        handle = str(process.pid)
        self._processes[handle] = process
        # A helper that outlives the stage would hold the log pipe open for ever.
        threading.Thread(target=_reap, args=(process,), daemon=True).start()
        return handle

    def status(self, handle: str) -> JobState:
        """Where the process is: a signal or the contract's "resume me" is an interruption."""
        code = self._processes[handle].poll()
        if code is None:
            return JobState.RUNNING
        if code == EXIT_OK:
            return JobState.SUCCEEDED
        return JobState.INTERRUPTED if code == EXIT_RESUME or code < 0 else JobState.FAILED

    def logs(self, handle: str) -> Iterator[str]:
        """Lines of standard output and error until the process has ended."""
        process = self._processes[handle]
        assert process.stdout is not None
        for line in process.stdout:
            yield line.decode(errors="replace").rstrip("\r\n")
        process.wait()

    def cancel(self, handle: str, grace_s: float) -> None:
        """SIGTERM to the stage, which then saves and ends; SIGKILL to all that is left."""
        process = self._processes[handle]
        family: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
        _kill_group(process.pid)
        end_processes(family, grace_s=0.5)


def _reap(process: subprocess.Popen[bytes]) -> None:
    process.wait()
    _kill_group(process.pid)


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
