"""How things look on every page: colours, units, the few widgets that all pages share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import altair as alt
import streamlit as st

GROUP_COLOURS = {
    "curation": "#4c9a5b",
    "bootstrap": "#8a6d3b",
    "alignment": "#0f6d8c",
    "pretraining": "#6b7fd7",
    "post_training": "#a4508b",
    "evaluation": "#d9822b",
    "deployment": "#c8453b",
}

# Plain glyphs: they need no emoji font and read well in tables and menus.
_STATUS_MARKS = {
    "pending": "○",
    "created": "○",
    "running": "▶",
    "finished": "✓",
    "failed": "✗",
    "stopped": "■",
    "lost": "■",
}
_STATUS_COLOURS = {
    "running": "blue",
    "finished": "green",
    "failed": "red",
    "stopped": "orange",
    "lost": "orange",
}


def status_mark(status: str) -> str:
    """One glyph for a status."""
    return _STATUS_MARKS.get(status, "○")


def status_text(status: str, cached: bool = False) -> str:
    """A status with its glyph."""
    return f"{status_mark(status)} {'cached' if cached else status}"


def status_colour(status: str) -> str:
    """Streamlit's name of the status's colour."""
    return _STATUS_COLOURS.get(status, "gray")


def status_badge(status: str, cached: bool = False) -> str:
    """A status as a coloured badge, in markdown."""
    return f":{status_colour(status)}-badge[{status_text(status, cached)}]"


def seconds_text(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size_text(size: float) -> str:
    """Bytes in the nearest unit of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def time_text(moment: datetime | None) -> str:
    """Day and minute, UTC."""
    return f"{moment:%Y-%m-%d %H:%M} UTC" if moment else "–"


def short(digest: str) -> str:
    """Enough of a digest to find the artifact again."""
    return digest[:12]


def label(name: str) -> str:
    """A field's name for people."""
    return name.replace("_", " ")


def number(value: Any) -> str:
    """A figure for a table cell."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def table(rows: Sequence[Mapping[str, Any]]) -> alt.InlineData:
    """Rows as a chart's data."""
    return alt.InlineData(values=[dict(row) for row in rows])


def page_header(title: str, caption: str) -> None:
    """Title and one line on what the page is for."""
    st.title(title)
    st.caption(caption)


def nothing_yet(what: str, how: str) -> None:
    """An empty page that says what to do."""
    st.info(f"**{what}**  \n{how}", icon=":material/sailing:")


HOW_TO_RUN = (
    "Start one with `make demo`, or with `sailyard run --recipe tiny`; it appears here at once."
)
