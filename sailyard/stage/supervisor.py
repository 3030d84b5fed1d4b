"""A stage in a child process, watched by a parent that outlives it.

The parent does three things a stage cannot do for itself once it is killed, runs out of
memory or crashes in native code: it ships every line the stage wrote to the store, says in
``result.json`` how the stage ended, and ends the processes the stage left behind.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from sailyard.processes import adopt_orphans, die_with_parent, end_children
from sailyard.runs import stage_result
from sailyard.stage.errors import EXIT_FAILED, EXIT_OK, EXIT_RESUME
from sailyard.stage.results import StageResult, write_run_copy
from sailyard.stage.runner import STOP_SIGNALS, execute
from sailyard.stage.shipping import LogShipper
from sailyard.yard import Yard

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from sailyard.pipeline import Stage
    from sailyard.runs import Run


def supervise(yard: Yard, run: Run, stage: Stage, *, force: bool = False) -> int:
    """Run a stage in a child process and return its exit code, as ``runner.execute`` does.

    When the child was killed, this process ends by the same signal, so that whoever started
    it sees the truth.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    log_read, log_write = os.pipe()
    bar_read, bar_write = os.pipe()
    show_bar = sys.stdout.isatty()
    adopt_orphans()
    # A request to stop that arrives before the handlers stand is kept, not lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(log_read)
        os.close(bar_read)
        os.set_blocking(bar_write, False)
        channel = bar_write if show_bar else None
        # Connections the parent may have open must not be shared, hence a yard of its own.
        own = Yard(yard.settings)
        _be_the_child(
            parent, log_write, lambda: execute(own, run, stage, force=force, channel=channel)
        )
    os.close(log_write)
    os.close(bar_write)
    shipper = LogShipper(yard, run.id, stage.name)
    with _forwarding(child), _screen(stage.name, show_bar) as screen:
        watch = _Watch(yard, child, log_read, bar_read, shipper, screen)
        code = os.waitstatus_to_exitcode(watch.pass_on_until_end())
        end_children()
        if why := _why_lost(yard, run, stage, code):
            watch.line(f"{stage.name}: {_note_lost(yard, run, stage, why)}")
        shipper.close()
    if code in (-signal.SIGKILL, -signal.SIGTERM):
        os.kill(os.getpid(), -code)
    return code if code >= 0 else EXIT_FAILED


def _be_the_child(parent: int, log_write: int, body: Callable[[], int]) -> None:
    """Run the body with output into the pipe, and end the process."""
    code = EXIT_FAILED
    try:
        die_with_parent(parent)
        for standard in (1, 2):
            os.dup2(log_write, standard)
        os.close(log_write)
        # Both names write lines at once: a log is read while it is written.
        sys.stdout = sys.stderr = os.fdopen(
            1, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False
        )
        logging.basicConfig(
            level=logging.INFO,
            format="%(asctime)s %(name)s %(levelname)s %(message)s",
            datefmt="%H:%M:%S",
            stream=sys.stdout,
            force=True,
        )
        code = body()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


class _Screen:
    """Where the person or program that started the stage reads along."""

    def __init__(self, progress: Progress | None = None, task: TaskID | None = None) -> None:
        self._progress = progress
        self._task = task

    def line(self, text: str) -> None:
        """Show a line of the log."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
            return
        # A reader that went away must not stop the stage.
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.write(text + "\n")
            sys.stdout.flush()

    def progress(self, message: dict[str, Any]) -> None:
        """Move the bar."""
        if self._progress is not None and self._task is not None:
            done, total, note = message["done"], message["total"], message["note"]
            self._progress.update(self._task, completed=done, total=total or None, note=note)


@contextlib.contextmanager
def _screen(stage_name: str, show_bar: bool) -> Iterator[_Screen]:
    if not show_bar:
        yield _Screen()
        return
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[note]}", markup=False),
    )
    with rich_progress.Progress(*columns) as progress:
        yield _Screen(progress, progress.add_task(stage_name, total=None, note=""))


class _Watch:
    """Reads the child's two pipes until it has ended."""

    def __init__(
        self,
        yard: Yard,
        child: int,
        log_read: int,
        bar_read: int,
        shipper: LogShipper,
        screen: _Screen,
    ) -> None:
        self._yard = yard
        self._child = child
        self._takers: dict[int, Callable[[str], None]] = {
            log_read: self.line,
            bar_read: self._progress,
        }
        self._shipper = shipper
        self._screen = screen

    def pass_on_until_end(self) -> int:
        """Pass lines on; returns the child's wait status."""
        buffers = dict.fromkeys(self._takers, b"")
        open_ends = set(self._takers)
        status: int | None = None
        while open_ends:
            # A helper that the stage left behind may hold the pipe open for ever: once the
            # child is gone, what is in the pipe is read, and that is all.
            wait = 0.2 if status is None else 0.0
            ready, _, _ = select.select(list(open_ends), [], [], wait)
            if not ready and status is not None:
                break
            for end in ready:
                data = os.read(end, 1 << 16)
                if not data:
                    open_ends.discard(end)
                *lines, buffers[end] = (buffers[end] + data).split(b"\n")
                for line in lines:
                    self._takers[end](line.decode(errors="replace"))
            if status is None:
                pid, waited = os.waitpid(self._child, os.WNOHANG)
                status = waited if pid else None
        for end, rest in buffers.items():
            os.close(end)
            if rest:
                self._takers[end](rest.decode(errors="replace"))
        return os.waitpid(self._child, 0)[1] if status is None else status

    def line(self, text: str) -> None:
        """Show a line of the log and keep it."""
        text = self._yard.redact(text.rstrip("\r"))
        self._shipper.add(text + "\n")
        self._screen.line(text)

    def _progress(self, text: str) -> None:
        with contextlib.suppress(ValueError, KeyError):
            self._screen.progress(json.loads(text))


def _why_lost(yard: Yard, run: Run, stage: Stage, code: int) -> str:
    """How a stage ended that could not say so itself; "" for one that did."""
    if code < 0:
        hint = ", perhaps for lack of memory" if code == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}; run it again to go on"
    if code in (EXIT_OK, EXIT_RESUME):
        return ""
    with contextlib.suppress(Exception):
        known = stage_result(run.id, stage.name, yard)
        if known is not None and known.status == "running":
            return f"ended at once with status {code}, see the lines above; run it again to go on"
    return ""


def _note_lost(yard: Yard, run: Run, stage: Stage, error: str) -> str:
    """Write down that the stage is lost; returns a sentence about it."""
    try:
        known = stage_result(run.id, stage.name, yard)
        if known is None or not known.finished:
            lost = known or StageResult(stage.name, "", "lost", run.id)
            write_run_copy(yard.store, run.id, lost, status="lost", error=error)
        from sailyard.lineage import records

        records.mark_lost(yard.database)
    except Exception as problem:
        return yard.redact(f"{error}; this could not be recorded: {problem}")
    return error


@contextlib.contextmanager
def _forwarding(child: int) -> Iterator[None]:
    """Pass requests to stop on to the stage, and go on watching it."""

    def forward(number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    before = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
