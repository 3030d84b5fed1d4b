"""Charts of real tables: what a chart shows, and whether it can be read at all.

A chart shows 2-4 marks whose real values, divided by a stated unit, stand at integers 1-9 on a
fixed 0-9 axis. A draft may be unreadable (a mark below the axis, no clear largest slice);
`fault` says why, and only sound charts are asked about.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from curation.world.scene import COLOUR_NAMES, in_heldout, pick, sample_background
from curation.world.tables import AXIS_MAX, Table, load_tables, unit_for

KIND_NAMES = {
    "bar": "bar chart",
    "row": "row chart",  # the bars of a bar chart, lying
    "line": "line chart",
    "pie": "pie chart",
    "scatter": "scatter plot",
    "area": "area chart",
    "histogram": "histogram",
    "heatmap": "heatmap",
    "box": "box plot",
}
MARKS = {
    "bar": "bar",
    "row": "bar",
    "line": "point",
    "pie": "slice",
    "scatter": "point",
    "area": "point",
    "histogram": "bar",
    "heatmap": "cell",
    "box": "box",
}
# Charts whose marks are compared, not read: one mark must clearly be the largest.
EXTREME_KINDS = ("pie", "heatmap")
HEATMAP_CELLS = ("top left", "top right", "bottom left", "bottom right")
COMMON_KINDS = ("bar", "bar", "row", "line", "pie")
_BOX_ROWS = 9


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart. `marks` names each mark by its colour (a heatmap's by their place) in drawing
    order; `values` are what they stand at (a box's median); `raw` what the table says.

    `spread` holds (low, lower quartile, upper quartile, high) per box of a box plot; `xs` where
    a scatter plot's points stand, 0 to 1.
    """

    kind: str
    topic: str
    dataset: str
    unit: float
    labels: tuple[str, ...]
    raw: tuple[float, ...]
    marks: tuple[str, ...]
    values: tuple[int, ...]
    background: tuple[int, int, int]
    spread: tuple[tuple[int, int, int, int], ...] = ()
    xs: tuple[float, ...] = ()

    def key(self) -> str:
        marks = ",".join(f"{m}:{v}" for m, v in zip(self.marks, self.values, strict=True))
        return f"chart:{self.kind}:{marks}"

    def largest(self) -> str:
        """The mark with the largest value; a sound pie or heatmap has exactly one."""
        return self.marks[self.values.index(max(self.values))]

    def meta(self) -> dict[str, Any]:
        return {
            "kind": "chart",
            "chart": self.kind,
            "topic": self.topic,
            "dataset": self.dataset,
            "unit": self.unit,
            "labels": list(self.labels),
            "raw": list(self.raw),
            "colours": list(self.marks),
            "values": list(self.values),
            "key": self.key(),
        }


def draft_chart(rng: np.random.Generator, kind: str) -> Chart:
    """A chart of random real rows, sound or not."""
    if kind not in KIND_NAMES:
        raise ValueError(f"unknown chart kind {kind!r}; there are {', '.join(KIND_NAMES)}")
    table = pick(rng, load_tables())
    num = 4 if kind == "heatmap" else 2 + int(rng.random() * 3)
    background, _ = sample_background(rng)
    colours = tuple(COLOUR_NAMES[int(i)] for i in rng.permutation(len(COLOUR_NAMES))[:num])
    marks = HEATMAP_CELLS if kind == "heatmap" else colours
    if kind == "box":
        return _box_plot(rng, table, marks, background)
    if kind == "histogram":
        labels, raw = _histogram(table, num)
        picked = list(range(num))
    else:
        picked = sorted(int(i) for i in rng.choice(len(table.rows), num, replace=False))
        labels = tuple(table.rows[i][0] for i in picked)
        raw = tuple(table.rows[i][1] for i in picked)
    unit = unit_for(raw)
    values = tuple(round(value / unit) for value in raw)
    # A scatter plot's points stand at their rows' places in the table.
    xs = tuple(i / len(table.rows) for i in picked) if kind == "scatter" else ()
    return Chart(
        kind, table.topic, table.dataset, unit, labels, raw, marks, values, background, xs=xs
    )


def _histogram(table: Table, num: int) -> tuple[tuple[str, ...], tuple[float, ...]]:
    counts, edges = np.histogram([value for _, value in table.rows], bins=num)
    labels = tuple(f"{a:.3g}-{b:.3g}" for a, b in pairwise(edges))
    return labels, tuple(float(c) for c in counts)


def _box_plot(
    rng: np.random.Generator, table: Table, colours: tuple[str, ...], background: tuple[int, ...]
) -> Chart:
    """Each box summarises rows drawn from the table."""
    picks = [rng.choice(len(table.rows), _BOX_ROWS, replace=False) for _ in colours]
    groups = [[table.rows[int(i)][1] for i in pick_] for pick_ in picks]
    quartiles = [np.percentile(g, (0, 25, 50, 75, 100)) for g in groups]
    unit = unit_for([float(q[4]) for q in quartiles])
    scaled = [tuple(round(float(x) / unit) for x in q) for q in quartiles]
    return Chart(
        "box",
        table.topic,
        table.dataset,
        unit,
        tuple(f"sample {i + 1}" for i in range(len(colours))),
        tuple(float(q[2]) for q in quartiles),
        colours,
        tuple(q[2] for q in scaled),
        (background[0], background[1], background[2]),
        spread=tuple((q[0], q[1], q[3], q[4]) for q in scaled),
    )


def fault(chart: Chart) -> str | None:
    """Why a chart cannot be read: "off_axis", "no_extreme", "overlap", "flat", or None."""
    if min(chart.values) < 1 or max(chart.values) > AXIS_MAX:
        return "off_axis"
    ordered = sorted(chart.values)
    if chart.kind in EXTREME_KINDS and ordered[-1] - ordered[-2] < 2:
        return "no_extreme"
    # At 84 pixels two points nearer than a tenth of the axis cover each other.
    gaps = [b - a for a, b in pairwise(sorted(chart.xs))]
    if gaps and min(gaps) < 0.1:
        return "overlap"
    if chart.spread and any(q3 - q1 < 2 for _, q1, q3, _ in chart.spread):
        return "flat"
    return None


def sample_chart(
    rng: np.random.Generator, *, heldout: bool = False, kind: str | None = None
) -> Chart:
    """A sound chart on the asked side of the split; of a common kind unless one is named."""
    while True:
        chart = draft_chart(rng, kind or pick(rng, COMMON_KINDS))
        if fault(chart) is None and in_heldout(chart.key()) == heldout:
            return chart
