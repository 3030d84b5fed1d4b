"""Drawing of charts, and reading the drawn values back from the pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from curation.world.draw import OVERSAMPLE, font
from curation.world.plots import HEATMAP_CELLS, Chart
from curation.world.scene import COLOURS
from curation.world.tables import AXIS_MAX

GREY = (120, 120, 120)
FAINT = (205, 205, 205)
FILL = (214, 222, 236)
# Pixels this near to a colour belong to its mark (summed absolute difference of R, G and B).
_NEAR = 40


class Frame:
    """Where the axes lie: the value axis starts at `base` and one unit is `unit_px` pixels."""

    def __init__(self, size: int, lying: bool) -> None:
        self.size = size
        self.unit_px = size * 0.88 / (AXIS_MAX + 0.4)
        if lying:
            self.low, self.high, self.base = 3, size - 1 - round(size * 0.14), 3
        else:
            self.low, self.high, self.base = round(size * 0.15), size - 3, size - 1 - size // 17

    def slots(self, num: int) -> tuple[list[float], float]:
        """Centres of `num` equal slots along the label axis, and a slot's width."""
        width = (self.high - self.low) / num
        return [self.low + width * (i + 0.5) for i in range(num)], width

    def offset(self, value: float) -> int:
        return round(value * self.unit_px)


def draw_chart(chart: Chart, image_size: int) -> Image.Image:
    """An RGB image of a chart, `image_size` pixels a side."""
    if chart.kind == "pie":
        return _draw_pie(chart, image_size)
    image = Image.new("RGB", (image_size, image_size), chart.background)
    canvas = ImageDraw.Draw(image)
    if chart.kind == "heatmap":
        _draw_heatmap(canvas, chart, image_size)
    elif chart.kind == "row":
        _draw_rows(canvas, chart, Frame(image_size, lying=True))
    else:
        _draw_upright(canvas, chart, Frame(image_size, lying=False))
    return image


def _draw_upright(canvas: ImageDraw.ImageDraw, chart: Chart, frame: Frame) -> None:
    for value in range(AXIS_MAX + 1):
        y = frame.base - frame.offset(value)
        major = value % 3 == 0
        canvas.line((frame.low, y, frame.high, y), fill=FAINT if value else GREY)
        canvas.line((frame.low - (3 if major else 1), y, frame.low, y), fill=GREY)
        if major and value:
            small = font(frame.size // 9)
            canvas.text((frame.low - 4, y), str(value), fill=GREY, font=small, anchor="rm")
    canvas.line((frame.low, frame.base - frame.offset(AXIS_MAX), frame.low, frame.base), fill=GREY)
    centres, width = frame.slots(len(chart.values))
    if chart.xs:
        reach = frame.high - frame.low - 12
        centres = [frame.low + 6 + x * reach for x in chart.xs]
    tops = [frame.base - frame.offset(value) for value in chart.values]
    if chart.kind in ("bar", "histogram"):
        half = (
            width / 2 - 0.5 if chart.kind == "histogram" else min(width * 0.36, frame.size * 0.11)
        )
        for x, y, mark in zip(centres, tops, chart.marks, strict=True):
            canvas.rectangle((x - half, y, x + half, frame.base), fill=COLOURS[mark])
    elif chart.kind == "box":
        _draw_boxes(canvas, chart, frame, centres, min(width * 0.32, frame.size * 0.1))
    else:
        _draw_points(canvas, chart, frame, list(zip(centres, tops, strict=True)))


def _draw_points(
    canvas: ImageDraw.ImageDraw, chart: Chart, frame: Frame, points: list[tuple[float, int]]
) -> None:
    if chart.kind == "area":
        ends = [(points[-1][0], frame.base), (points[0][0], frame.base)]
        canvas.polygon([*points, *ends], fill=FILL)
    if chart.kind in ("line", "area"):
        canvas.line(points, fill=GREY, width=1)
    radius = frame.size * 0.055
    for (x, y), mark in zip(points, chart.marks, strict=True):
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[mark])


def _draw_boxes(
    canvas: ImageDraw.ImageDraw, chart: Chart, frame: Frame, centres: list[float], half: float
) -> None:
    for x, median, mark, (low, q1, q3, high) in zip(
        centres, chart.values, chart.marks, chart.spread, strict=True
    ):
        whisker = (x, frame.base - frame.offset(high), x, frame.base - frame.offset(low))
        canvas.line(whisker, fill=GREY)
        top, bottom = frame.base - frame.offset(q3), frame.base - frame.offset(q1)
        canvas.rectangle((x - half, top, x + half, bottom), fill=COLOURS[mark])
        y = frame.base - frame.offset(median)
        canvas.line((x - half, y, x + half, y), fill=(255, 255, 255), width=2)


def _draw_rows(canvas: ImageDraw.ImageDraw, chart: Chart, frame: Frame) -> None:
    for value in range(AXIS_MAX + 1):
        x = frame.base + frame.offset(value)
        major = value % 3 == 0
        end = frame.high + (3 if major else 1)
        canvas.line((x, frame.low, x, end), fill=FAINT if value else GREY)
        if major and value:
            small = font(frame.size // 9)
            canvas.text((x, frame.high + 3), str(value), fill=GREY, font=small, anchor="mt")
    centres, width = frame.slots(len(chart.values))
    half = min(width * 0.36, frame.size * 0.11)
    for y, value, mark in zip(centres, chart.values, chart.marks, strict=True):
        end = frame.base + frame.offset(value)
        canvas.rectangle((frame.base, y - half, end, y + half), fill=COLOURS[mark])


def _draw_pie(chart: Chart, size: int) -> Image.Image:
    side = size * OVERSAMPLE
    image = Image.new("RGB", (side, side), chart.background)
    canvas = ImageDraw.Draw(image)
    margin, angle, total = side * 0.08, -90.0, sum(chart.values)
    for mark, value in zip(chart.marks, chart.values, strict=True):
        end = angle + 360 * value / total
        canvas.pieslice((margin, margin, side - margin, side - margin), angle, end, COLOURS[mark])
        angle = end
    return image.reduce(OVERSAMPLE)


def _heat(value: int) -> tuple[int, int, int]:
    """From pale to dark blue as the value goes from 1 to 9."""
    share = (value - 1) / (AXIS_MAX - 1)
    return round(225 - 205 * share), round(235 - 195 * share), round(248 - 128 * share)


def _heat_box(index: int, size: int) -> tuple[int, int, int, int]:
    row, column = divmod(index, 2)
    side, margin = round(size * 0.44), round(size * 0.05)
    x, y = margin + column * (side + 1), margin + row * (side + 1)
    return x, y, x + side - 1, y + side - 1


def _draw_heatmap(canvas: ImageDraw.ImageDraw, chart: Chart, size: int) -> None:
    for index, value in enumerate(chart.values):
        canvas.rectangle(_heat_box(index, size), fill=_heat(value), outline=GREY)


# --- reading back ---------------------------------------------------------------------------------


def measure_chart(chart: Chart, image: Image.Image) -> list[float]:
    """The value of every mark as the pixels show it, in the chart's order.

    Pies give shares of the pie times the values' sum, heatmaps the shade's value, box plots the
    middle of the box. NaN where a mark cannot be found.
    """
    pixels = np.asarray(image.convert("RGB")).astype(int)
    size = image.width
    if chart.kind == "heatmap":
        return [_measure_heat(pixels, _heat_box(i, size)) for i in range(len(HEATMAP_CELLS))]
    masks = [np.abs(pixels - COLOURS[mark]).sum(axis=2) < _NEAR for mark in chart.marks]
    if chart.kind == "pie":
        total = sum(mask.sum() for mask in masks)
        return [float(mask.sum() / total * sum(chart.values)) for mask in masks]
    frame = Frame(size, lying=chart.kind == "row")
    return [_measure_mark(chart.kind, mask, frame) for mask in masks]


def _measure_heat(pixels: np.ndarray, box: tuple[int, int, int, int]) -> float:
    x1, y1, x2, y2 = box
    red = pixels[y1 + 2 : y2 - 1, x1 + 2 : x2 - 1, 0].mean()
    return float((225 - red) / 205 * (AXIS_MAX - 1) + 1)


def _measure_mark(kind: str, mask: np.ndarray, frame: Frame) -> float:
    along = np.flatnonzero(mask.any(axis=0 if kind == "row" else 1))
    if len(along) == 0:
        return float("nan")
    if kind == "row":
        return float((along[-1] - frame.base) / frame.unit_px)
    if kind in ("bar", "histogram"):
        return float((frame.base - along[0]) / frame.unit_px)
    return float((frame.base - (along[0] + along[-1]) / 2) / frame.unit_px)


def expected_values(chart: Chart) -> list[float]:
    """What `measure_chart` should read."""
    if chart.kind == "box":
        return [(q1 + q3) / 2 for _, q1, q3, _ in chart.spread]
    return [float(value) for value in chart.values]


def reads_back(chart: Chart, image: Image.Image) -> bool:
    """Whether every mark, measured from the pixels, rounds to the value it should show."""
    measured = measure_chart(chart, image)
    expected = expected_values(chart)
    return all(abs(m - e) < 0.5 for m, e in zip(measured, expected, strict=True))
