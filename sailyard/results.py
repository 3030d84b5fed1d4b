"""The README's results, generated from the report so that no figure is typed by hand.

``python -m sailyard.results README.md`` (``make results``) replaces what stands between the two
markers by the latest run's tables.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


class NoMarkers(ValueError):
    """The document does not say where the results go."""


def results_markdown(body: Mapping[str, Any]) -> str:
    """Every table of a report as Markdown, under one line that says which run it was."""
    from sailyard.report import report_tables

    run = body["run"]
    parts = [
        f"Recipe `{run['recipe']}`, run `{run['id']}`: {run['stages_finished']} of "
        f"{run['stages']} stages, {run['computed_seconds'] / 60:.1f} minutes of stage time."
    ]
    for title, columns, rows in report_tables(body):
        if rows and "status" not in columns:  # forty stages are not for a front page
            parts.append(f"**{title}**\n\n{_table(columns, rows)}")
    return "\n\n".join(parts)


def replace_results(text: str, results: str) -> str:
    """The document with its results replaced.

    Raises:
        NoMarkers: The document lacks the markers, or has them the wrong way round.
    """
    start, end = text.find(BEGIN), text.find(END)
    if start < 0 or end < start:
        raise NoMarkers(f"the document needs a line {BEGIN} and, below it, a line {END}")
    return f"{text[: start + len(BEGIN)]}\n{results}\n{text[end:]}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [_row(columns), _row(["---"] * len(columns)), *map(_row, rows)]
    return "\n".join(lines)


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")


def main(path: Path) -> None:
    """Update the document in place from the latest run."""
    from sailyard.report import build_report
    from sailyard.yard import Yard

    results = results_markdown(build_report(Yard()))
    path.write_text(replace_results(path.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
