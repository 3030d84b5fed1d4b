"""Charts drawn from real tables (vega-datasets): bars, lines and pies readable at 84 pixels.

A chart shows 2-4 rows of a real column. The values are divided by a stated unit and rounded,
so that each mark stands at an integer 1-9 on a fixed 0-9 axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from curation.world.draw import OVERSAMPLE, font
from curation.world.scene import COLOUR_NAMES, COLOURS, in_heldout, pick, sample_background

MARKS = {"bar": "bar", "row": "bar", "line": "point", "pie": "slice"}
KIND_NAMES = {"bar": "bar chart", "row": "row chart", "line": "line chart", "pie": "pie chart"}
AXIS_MAX = 9
GREY = (120, 120, 120)
FAINT = (205, 205, 205)


@dataclass(frozen=True, slots=True)
class Table:
    """One numeric column of a real data set: (label, value) rows."""

    dataset: str
    topic: str
    rows: tuple[tuple[str, float], ...]


@lru_cache(maxsize=1)
def load_tables() -> tuple[Table, ...]:
    """The real tables charts are drawn from; read from vega-datasets' bundled files."""
    from vega_datasets import local_data  # imports pandas, so only where charts are drawn

    def column(frame: Any, dataset: str, label: str, value: str, topic: str) -> Table:
        rows = frame[[label, value]].dropna().itertuples(index=False)
        return Table(dataset, topic, tuple((str(a)[:32], float(b)) for a, b in rows if b > 0))

    cars, barley = local_data.cars(), local_data.barley()
    wheat, driving = local_data.wheat(), local_data.driving()
    weather, iris = local_data.seattle_weather(), local_data.iris()
    crimea, jobs = local_data.crimea(), local_data.us_employment()
    return (
        column(cars, "cars", "Name", "Miles_per_Gallon", "miles per gallon of cars"),
        column(cars, "cars", "Name", "Horsepower", "horsepower of cars"),
        column(cars, "cars", "Name", "Weight_in_lbs", "weight of cars"),
        column(barley, "barley", "variety", "yield", "barley yield"),
        column(wheat, "wheat", "year", "wheat", "price of wheat"),
        column(wheat, "wheat", "year", "wages", "weekly wages"),
        column(driving, "driving", "year", "miles", "miles driven"),
        column(driving, "driving", "year", "gas", "price of gas"),
        column(weather, "seattle-weather", "date", "temp_max", "warmth in Seattle"),
        column(weather, "seattle-weather", "date", "wind", "wind in Seattle"),
        column(iris, "iris", "species", "petalLength", "petal length"),
        column(crimea, "crimea", "date", "disease", "deaths in Crimea"),
        column(jobs, "us-employment", "month", "construction", "jobs in construction"),
        column(local_data.iowa_electricity(), "iowa-electricity", "source", "net_generation",
               "electricity in Iowa"),
        column(local_data.stocks(), "stocks", "symbol", "price", "stock price"),
    )  # fmt: skip


def unit_for(values: list[float]) -> float:
    """The largest 1, 2 or 5 times a power of ten that brings the top value into 4.5-9.49."""
    top = max(values)
    power = 10.0 ** math.floor(math.log10(top / AXIS_MAX))
    for step in (1, 2, 5, 10):
        if top / (step * power) < AXIS_MAX + 0.49:
            return step * power
    raise AssertionError("10 steps of the power of ten below top / 9 always suffice")


@dataclass(frozen=True, slots=True)
class Chart:
    """`kind` is a key of MARKS; `values` are integers 1-9 in drawing order, one per colour."""

    kind: str
    topic: str
    dataset: str
    unit: float
    labels: tuple[str, ...]
    raw: tuple[float, ...]
    colours: tuple[str, ...]
    values: tuple[int, ...]
    background: tuple[int, int, int]

    def key(self) -> str:
        marks = ",".join(f"{c}:{v}" for c, v in zip(self.colours, self.values, strict=True))
        return f"chart:{self.kind}:{marks}"

    def meta(self) -> dict[str, Any]:
        return {
            "kind": "chart",
            "chart": self.kind,
            "topic": self.topic,
            "dataset": self.dataset,
            "unit": self.unit,
            "labels": list(self.labels),
            "raw": list(self.raw),
            "colours": list(self.colours),
            "values": list(self.values),
            "key": self.key(),
        }


def sample_chart(
    rng: np.random.Generator, *, heldout: bool = False, kind: str | None = None
) -> Chart:
    """A chart of 2-4 real rows on the asked side of the split. Pies have one largest slice."""
    while True:
        table = pick(rng, load_tables())
        num = 2 + int(rng.random() * 3)
        rows = [table.rows[int(i)] for i in rng.choice(len(table.rows), num, replace=False)]
        raw = [value for _, value in rows]
        unit = unit_for(raw)
        values = [round(value / unit) for value in raw]
        chosen = kind or ("bar", "bar", "row", "line", "pie")[int(rng.random() * 5)]
        distinct_top = sorted(values)[-1] - sorted(values)[-2] >= 2
        if min(values) < 1 or (chosen == "pie" and not distinct_top):
            continue
        colours = [COLOUR_NAMES[int(i)] for i in rng.permutation(len(COLOUR_NAMES))[:num]]
        background, _ = sample_background(rng)
        chart = Chart(
            chosen, table.topic, table.dataset, unit, tuple(r[0] for r in rows), tuple(raw),
            tuple(colours), tuple(values), background,
        )  # fmt: skip
        if in_heldout(chart.key()) == heldout:
            return chart


def _axes(canvas: ImageDraw.ImageDraw, size: int, left: int, right: int, unit_px: float) -> int:
    base = size - 1 - round(size * 0.06)
    for value in range(AXIS_MAX + 1):
        y = base - round(value * unit_px)
        major = value % 3 == 0
        canvas.line((left, y, right, y), fill=FAINT if value else GREY)
        canvas.line((left - (3 if major else 1), y, left, y), fill=GREY)
        if major and value:
            canvas.text((left - 4, y), str(value), fill=GREY, font=font(size // 9), anchor="rm")
    canvas.line((left, base - round(AXIS_MAX * unit_px), left, base), fill=GREY)
    return base


def _draw_upright(chart: Chart, size: int) -> Image.Image:
    image = Image.new("RGB", (size, size), chart.background)
    canvas = ImageDraw.Draw(image)
    left, right, unit_px = round(size * 0.15), size - 3, size * 0.88 / (AXIS_MAX + 0.4)
    base = _axes(canvas, size, left, right, unit_px)
    slot = (right - left) / len(chart.values)
    points = []
    for i, (colour, value) in enumerate(zip(chart.colours, chart.values, strict=True)):
        x, y = left + slot * (i + 0.5), base - round(value * unit_px)
        points.append((x, y))
        if chart.kind == "bar":
            half = min(slot * 0.36, size * 0.11)
            canvas.rectangle((x - half, y, x + half, base), fill=COLOURS[colour])
    if chart.kind == "line":
        canvas.line(points, fill=GREY, width=1)
        radius = size * 0.055
        for (x, y), colour in zip(points, chart.colours, strict=True):
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[colour])
    return image


def _draw_pie(chart: Chart, size: int) -> Image.Image:
    side = size * OVERSAMPLE
    image = Image.new("RGB", (side, side), chart.background)
    canvas = ImageDraw.Draw(image)
    margin, angle, total = side * 0.08, -90.0, sum(chart.values)
    for colour, value in zip(chart.colours, chart.values, strict=True):
        end = angle + 360 * value / total
        canvas.pieslice((margin, margin, side - margin, side - margin), angle, end, COLOURS[colour])
        angle = end
    return image.reduce(OVERSAMPLE)


def draw_chart(chart: Chart, image_size: int) -> Image.Image:
    """An RGB image of a chart. A row chart is the bar chart of the same values, lying down."""
    if chart.kind == "pie":
        return _draw_pie(chart, image_size)
    if chart.kind == "row":
        return _draw_row(chart, image_size)
    return _draw_upright(chart, image_size)


def _draw_row(chart: Chart, size: int) -> Image.Image:
    image = Image.new("RGB", (size, size), chart.background)
    canvas = ImageDraw.Draw(image)
    left, base, unit_px = 3, size - 1 - round(size * 0.14), size * 0.88 / (AXIS_MAX + 0.4)
    for value in range(AXIS_MAX + 1):
        x = left + round(value * unit_px)
        canvas.line((x, 3, x, base + (3 if value % 3 == 0 else 1)), fill=FAINT if value else GREY)
        if value % 3 == 0 and value:
            canvas.text((x, base + 3), str(value), fill=GREY, font=font(size // 9), anchor="mt")
    slot = (base - 3) / len(chart.values)
    for i, (colour, value) in enumerate(zip(chart.colours, chart.values, strict=True)):
        y, half = 3 + slot * (i + 0.5), min(slot * 0.36, size * 0.11)
        canvas.rectangle(
            (left, y - half, left + round(value * unit_px), y + half), fill=COLOURS[colour]
        )
    return image
