"""How commands speak: tables for people, JSON for programs, one clear line for errors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

STATUS_STYLES = {
    "finished": "green",
    "cached": "blue",
    "running": "bold cyan",
    "failed": "bold red",
    "lost": "red",
    "stopped": "yellow",
}

console = Console()
errors = Console(stderr=True)


def as_plain(value: Any) -> Any:
    """Records, datetimes and tuples as JSON types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, dict):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(item) for item in value]
    return value


def print_json(value: Any) -> None:
    """One JSON document on standard output, as it is: no colours, no wrapping."""
    print(json.dumps(as_plain(value), indent=2, ensure_ascii=False))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table; cells that are a status word are coloured."""
    table = Table(title=title or None, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*[_cell(value) for value in row])
    console.print(table)


def ago(moment: datetime) -> str:
    """A past moment in words."""
    seconds = (datetime.now(UTC) - moment).total_seconds()
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def duration(seconds: float) -> str:
    """A time span in words."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def byte_size(size: int) -> str:
    """A number of bytes in words."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _cell(value: Any) -> str:
    # Values come from recipes, logs and users: a bracket in them is not markup.
    text = str(value).replace("[", "\\[")
    style = STATUS_STYLES.get(str(value))
    return f"[{style}]{text}[/]" if style else text
