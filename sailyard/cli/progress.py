"""What ``sailyard run`` shows while the graph runs: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed

from sailyard.cli.output import console, duration
from sailyard.local import GraphObserver, StageEnd, describe_exit

if TYPE_CHECKING:
    from sailyard.runs import Run
    from sailyard.yard import Yard

POLL_SECONDS = 1.0


class GraphView:
    """One bar for the run and one for every stage under way."""

    def __init__(self, yard: Yard, run: Run, quiet: bool) -> None:
        self._yard, self._run, self._quiet = yard, run, quiet
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            Elapsed(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._whole: TaskID | None = None
        self._num_ended = 0
        self._next_poll = 0.0

    def __enter__(self) -> Self:
        self._bars.start()
        total = len(self._run.pipeline.stages)
        self._whole = self._bars.add_task(self._run.id, total=total, note="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def observer(self) -> GraphObserver:
        """The calls run_graph makes."""
        return GraphObserver(self._started, self._line, self._ended, self._poll)

    def say(self, text: str) -> None:
        """A line above the bars."""
        if not self._quiet:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _started(self, stage: str) -> None:
        self._tasks[stage] = self._bars.add_task(f"  {stage}", total=None, note="")
        if not console.is_terminal:
            self.say(f"{stage}: started")

    def _line(self, stage: str, text: str) -> None:
        self.say(text if text.startswith(stage) else f"{stage} | {text}")
        self._poll()

    def _ended(self, end: StageEnd) -> None:
        self._num_ended += 1
        task = self._tasks.pop(end.stage, None)
        if task is not None:
            self._bars.remove_task(task)
        if self._whole is not None:
            self._bars.update(self._whole, completed=self._num_ended)
        word = "cached" if end.cached else describe_exit(end.code)
        count = f"[{self._num_ended:>2}/{len(self._run.pipeline.stages)}]"
        self.say(f"{count} {end.stage}: {word} ({duration(end.seconds)})")

    def _poll(self) -> None:
        """Move the bars to the progress that the stages wrote to lineage."""
        now = time.monotonic()
        if self._bars.disable or now < self._next_poll or not self._tasks:
            return
        self._next_poll = now + POLL_SECONDS
        from sailyard.lineage import queries

        for row in queries.stage_runs(self._yard.database, self._run.id):
            task = self._tasks.get(row.stage)
            if task is not None and row.progress_total:
                self._bars.update(
                    task,
                    completed=row.progress_done,
                    total=row.progress_total,
                    note=row.progress_note,
                )


@contextmanager
def hashing_bar(screen: Console, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar for the reading of the user's data."""
    columns = (TextColumn("reading data"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=screen, disable=quiet, transient=True) as bars:
        task = bars.add_task("", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
