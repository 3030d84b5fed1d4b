"""Stages as subprocesses of this machine: one of them, or the whole graph."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sailyard import runs
from sailyard.forkserver import ForkedProcess, ForkServerError
from sailyard.processes import descendants, kill_group
from sailyard.stage.errors import EXIT_OK, EXIT_RESUME

if TYPE_CHECKING:
    from sailyard.runs import Run
    from sailyard.settings import Settings
    from sailyard.yard import Yard

GRACE_SECONDS = 20.0
"""How long a stage may take to save and stop before it is killed."""

FORK_SERVER = "SAILYARD_FORK_SERVER"
"""Environment variable that names the socket of a `sailyard.forkserver`."""


class StageProcess:
    """``sailyard stage run`` in a process group of its own."""

    def __init__(
        self, run_id: str, stage: str, *, force: bool = False, settings: Settings | None = None
    ) -> None:
        """Start it. Args: settings: For the process, where they are not the environment's."""
        command = ["stage", "run", stage, "--run", run_id, *(["--force"] if force else [])]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if settings is not None:
            environment |= settings.environment()
        self.stage = stage
        self.process = _start(command, environment)

    def lines(self) -> Iterator[str]:
        """Lines of its output while they come, until it has ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield line.decode(errors="replace").rstrip("\r\n")

    def wait(self) -> int:
        """Wait for its end; its exit code, negative for a signal."""
        return self.process.wait()

    def cancel(self, grace_seconds: float = GRACE_SECONDS) -> int:
        """Ask it to stop, then kill whatever is left of it; returns its exit code."""
        family: list[int] = []
        # The leader only: it tells the stage, and the stage's own helpers are needed to save.
        with suppress(ProcessLookupError):
            self.process.terminate()
        try:
            self.process.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            family = descendants(self.process.pid)
        kill_group(self.process.pid, family)
        return self.process.wait()


def _start(
    arguments: Sequence[str], environment: Mapping[str, str]
) -> subprocess.Popen[bytes] | ForkedProcess:
    """``sailyard *arguments``: forked where a fork server is offered, else from the ground up."""
    server = environment.get(FORK_SERVER)
    if server:
        # One that is not there costs seconds, not the stage.
        with suppress(OSError, ForkServerError):
            return ForkedProcess(Path(server), arguments, environment)
    return subprocess.Popen(
        [sys.executable, "-m", "sailyard", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@dataclass(frozen=True, slots=True)
class StageEnd:
    """How a stage of the graph ended.

    Attributes:
        stage: Its name.
        code: Exit code; 0 also for a reused result.
        cached: No process was started.
        seconds: Wall time.
    """

    stage: str
    code: int
    cached: bool
    seconds: float


@dataclass(slots=True)
class GraphObserver:
    """What a watcher of ``run_graph`` wants to hear; all calls come from its own thread."""

    started: Callable[[str], None] = lambda stage: None
    line: Callable[[str, str], None] = lambda stage, text: None
    ended: Callable[[StageEnd], None] = lambda end: None
    waiting: Callable[[], None] = lambda: None


def run_graph(
    yard: Yard, run: Run, *, jobs: int = 1, observer: GraphObserver | None = None
) -> list[StageEnd]:
    """Run every stage of a run, at most ``jobs`` at a time, each in its own process.

    Finished results are reused without a process. After a stage that failed or was stopped no
    further one starts; those that run are let finish. Interrupting the call (KeyboardInterrupt)
    stops every process and raises on.

    Returns:
        One entry per stage that ended, in order of ending.

    Raises:
        ValueError: ``jobs`` is less than 1.
    """
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; at least one stage must be able to run")
    return _GraphRun(yard, run, jobs, observer or GraphObserver()).carry_out()


class _GraphRun:
    def __init__(self, yard: Yard, run: Run, jobs: int, observer: GraphObserver) -> None:
        self.yard, self.run, self.jobs, self.observer = yard, run, jobs, observer
        self.results = runs.results_of(yard, run)
        self.ends: list[StageEnd] = []
        self.running: dict[str, tuple[StageProcess, float]] = {}
        # (stage, line) while it runs, (stage, None) at its end; threads only ever put.
        self.messages: queue.Queue[tuple[str, str | None]] = queue.Queue()

    def carry_out(self) -> list[StageEnd]:
        """The loop."""
        waiting = [stage.name for stage in self.run.pipeline.stages]
        try:
            while waiting or self.running:
                if not self._broken():
                    waiting = self._start_ready(waiting)
                if not self.running:
                    break
                self._take_messages()
        finally:
            self._stop_all()
        return self.ends

    def _broken(self) -> bool:
        return any(end.code != EXIT_OK for end in self.ends)

    def _start_ready(self, waiting: Sequence[str]) -> list[str]:
        """Start or reuse what can be; returns the stages that still wait."""
        left = list(waiting)
        done = {end.stage for end in self.ends}
        for name in waiting:
            if len(self.running) >= self.jobs or self._broken():
                break
            if not done.issuperset(self.run.pipeline.upstream(name)):
                continue
            left.remove(name)
            if self._reuse(name):
                done.add(name)
            else:
                self._start(name)
        return left

    def _reuse(self, name: str) -> bool:
        started = time.monotonic()
        if runs.reuse(self.yard, self.run, name, self.results) is None:
            return False
        self._end(StageEnd(name, EXIT_OK, True, time.monotonic() - started))
        return True

    def _start(self, name: str) -> None:
        process = StageProcess(self.run.id, name, settings=self.yard.settings)
        self.running[name] = (process, time.monotonic())
        self.observer.started(name)
        threading.Thread(target=self._read, args=(process,), daemon=True).start()

    def _read(self, process: StageProcess) -> None:
        # What a stage left behind may hold the pipe open after its end, so lines and the end
        # are waited for separately.
        reader = threading.Thread(target=self._read_lines, args=(process,), daemon=True)
        reader.start()
        process.wait()
        kill_group(process.process.pid, [])
        reader.join(5)
        self.messages.put((process.stage, None))

    def _read_lines(self, process: StageProcess) -> None:
        for line in process.lines():
            self.messages.put((process.stage, line))

    def _take_messages(self) -> None:
        try:
            name, line = self.messages.get(timeout=0.2)
        except queue.Empty:
            self.observer.waiting()
            return
        if line is not None:
            self.observer.line(name, line)
            return
        process, started = self.running.pop(name)
        self._end(StageEnd(name, process.wait(), False, time.monotonic() - started))

    def _end(self, end: StageEnd) -> None:
        self.ends.append(end)
        self.observer.ended(end)

    def _stop_all(self) -> None:
        threads = [threading.Thread(target=process.cancel) for process, _ in self.running.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def describe_exit(code: int) -> str:
    """A word or two about a stage process's exit code."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return {EXIT_OK: "finished", EXIT_RESUME: "stopped"}.get(code, "failed")
