"""Stages as subprocesses of this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from operators.launchers.base import JobState, StageJob
from sailyard.local import StageProcess
from sailyard.processes import kill_group
from sailyard.stage.errors import EXIT_OK, EXIT_RESUME


class LocalLauncher:
    """Runs each stage in a process group of its own, so that it ends as a whole."""

    detached = False

    def __init__(self) -> None:
        self._stages: dict[str, StageProcess] = {}

    def submit(self, job: StageJob) -> str:
        """Start ``sailyard stage run``; the handle is its process id."""
        stage = StageProcess(job.run_id, job.stage, force=job.force)
        handle = str(stage.process.pid)
        self._stages[handle] = stage
        # A helper that outlives the stage would hold the log pipe open for ever.
        threading.Thread(target=_reap, args=(stage,), daemon=True).start()
        return handle

    def status(self, handle: str) -> JobState:
        """Where the process is: a signal or the contract's "resume me" is an interruption."""
        code = self._stages[handle].process.poll()
        if code is None:
            return JobState.RUNNING
        if code == EXIT_OK:
            return JobState.SUCCEEDED
        return JobState.INTERRUPTED if code == EXIT_RESUME or code < 0 else JobState.FAILED

    def logs(self, handle: str) -> Iterator[str]:
        """Lines of standard output and error until the process has ended."""
        yield from self._stages[handle].lines()
        self._stages[handle].wait()

    def cancel(self, handle: str, grace_s: float) -> None:
        """Ask the stage to save and end; kill all that is left after ``grace_s`` seconds."""
        self._stages[handle].cancel(grace_s)


def _reap(stage: StageProcess) -> None:
    stage.wait()
    kill_group(stage.process.pid, [])
