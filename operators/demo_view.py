"""How a running pipeline is shown: a live table on a terminal, lines anywhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

WAITING = "waiting"
RUNNING = "running"
DONE = "done"
CACHED = "cached"
SKIPPED = "not in this recipe"
FAILED = "failed"
NOT_REACHED = "not reached"

ENDED = (DONE, CACHED, SKIPPED, FAILED, NOT_REACHED)

STYLES = {
    WAITING: "dim",
    RUNNING: "bold cyan",
    DONE: "green",
    CACHED: "blue",
    SKIPPED: "dim",
    FAILED: "bold red",
    NOT_REACHED: "dim",
}


@dataclass(frozen=True)
class Row:
    """One stage as the table shows it.

    Attributes:
        name: Of the stage.
        state: One of the states above, or Airflow's own word for a passing one (queued, ...).
        seconds: Run time so far or in all; None before the start.
        note: Progress while it runs, in the stage's own words.
    """

    name: str
    state: str
    seconds: float | None = None
    note: str = ""


class StageView:
    """Shows rows as they change. Use as a context manager; call ``update`` with all rows."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._states: dict[str, str] = {}

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, rows: Sequence[Row]) -> None:
        """Show the rows: redraw the table, or print a line for each state that changed."""
        if self._live is not None:
            # Title, header, rules and the prompt's line take about seven lines.
            self._live.update(table(window(rows, self._console.height - 7), rows), refresh=True)
            return
        for row in rows:
            if row.state != self._states.get(row.name, WAITING) and row.state in (RUNNING, *ENDED):
                num_ended = sum(row.state in ENDED for row in rows)
                seconds = "" if row.state == RUNNING else _seconds(row)
                self._console.print(
                    f"[{num_ended:>2}/{len(rows)}] {row.name}: {row.state} {seconds}".rstrip(),
                    markup=False,
                    highlight=False,
                )
                self._states[row.name] = row.state


def window(rows: Sequence[Row], height: int) -> Sequence[Row]:
    """At most ``height`` neighbouring rows, those where something happens among them."""
    height = max(height, 5)
    if len(rows) <= height:
        return rows
    active = [i for i, row in enumerate(rows) if row.state not in (WAITING, *ENDED)]
    ended = [i for i, row in enumerate(rows) if row.state in ENDED]
    focus = active[0] if active else (ended[-1] if ended else 0)
    start = min(max(0, focus - height // 3), len(rows) - height)
    return rows[start : start + height]


def table(shown: Sequence[Row], rows: Sequence[Row]) -> Table:
    """The shown rows as a table; title and counts are of all rows."""
    counts = {state: sum(row.state == state for row in rows) for state in ENDED}
    ended = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    result = Table(
        title=f"sail_vl2: {sum(counts.values())} of {len(rows)} stages ended",
        caption=ended or None,
        title_justify="left",
        caption_justify="left",
    )
    result.add_column("stage", no_wrap=True)
    result.add_column("state", no_wrap=True)
    result.add_column("time", justify="right", no_wrap=True)
    result.add_column("progress", no_wrap=True, overflow="ellipsis")
    for row in shown:
        state = Text(row.state, style=STYLES.get(row.state, "yellow"))
        result.add_row(row.name, state, _seconds(row), Text(row.note))
    return result


def _seconds(row: Row) -> str:
    return "" if row.seconds is None else f"{row.seconds:.1f} s"
