"""Scenes of MicroWorld: coloured shapes in a 3x3 grid, and the train/held-out split of layouts.

All coordinates are fractions of the image side, so a scene renders at any resolution.
The sizes below are our choice, tuned so that an 84-pixel image stays readable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (38, 150, 60),
    "blue": (40, 84, 214),
    "yellow": (242, 200, 20),
    "purple": (140, 60, 180),
    "black": (25, 25, 25),
}
COLOUR_NAMES = tuple(COLOURS)
CELLS = (
    "top left",
    "top center",
    "top right",
    "middle left",
    "center",
    "middle right",
    "bottom left",
    "bottom center",
    "bottom right",
)
MAX_THINGS = 4
MIN_SIZE, MAX_SIZE = 17 / 84, 23 / 84
JITTER = 3 / 84
# One layout in eight belongs to the held-out side, decided by the layout alone.
HELDOUT_MODULUS = 8

T = TypeVar("T")


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One item, uniformly. `random()` is several times cheaper than `integers()` or `choice()`."""
    return items[int(rng.random() * len(items))]


def pick_weighted(rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    """One name, with probability proportional to its weight."""
    mark = rng.random() * sum(weights.values())
    for name, weight in weights.items():
        mark -= weight
        if mark < 0:
            return name
    return name


def in_heldout(key: str) -> bool:
    """Which side of the split a layout key belongs to; the same in every run and process."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELDOUT_MODULUS == 0


def place(cell: int) -> str:
    """Where a cell is, with its preposition: "at the top left", "in the center"."""
    return "in the center" if cell == 4 else f"at the {CELLS[cell]}"


@dataclass(frozen=True, slots=True)
class Thing:
    """One object. `x`, `y` is its centre and `size` its side, as fractions of the image side."""

    cell: int
    shape: str
    colour: str
    x: float
    y: float
    size: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def row(self) -> int:
        return self.cell // 3

    @property
    def column(self) -> int:
        return self.cell % 3

    def box(self) -> tuple[int, int, int, int]:
        """(x1, y1, x2, y2) on a 0-1000 scale, rounded to 10: finer than one pixel of 84."""
        half = self.size / 2
        corners = (self.x - half, self.y - half, self.x + half, self.y + half)
        x1, y1, x2, y2 = (min(1000, max(0, round(c * 100) * 10)) for c in corners)
        return x1, y1, x2, y2


@dataclass(frozen=True, slots=True)
class Scene:
    """`things` are in reading order. `background` is RGB, `noise` the grain's amplitude (0-255)."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int]
    noise: int

    def key(self) -> str:
        """The layout: sorted (cell, shape, colour) triples. Jitter and size do not change it."""
        return layout_key((t.cell, t.shape, t.colour) for t in self.things)

    def meta(self) -> dict[str, Any]:
        """The truth, as JSON-able values for `Sample.meta["scene"]`."""
        things = [
            {"cell": t.cell, "shape": t.shape, "colour": t.colour, "box": list(t.box())}
            for t in self.things
        ]
        return {"kind": "scene", "things": things, "key": self.key()}


def layout_key(triples: Any) -> str:
    """The key of an iterable of (cell, shape, colour) triples, independent of their order."""
    return ";".join(f"{cell}:{shape}:{colour}" for cell, shape, colour in sorted(triples))


def sample_background(rng: np.random.Generator) -> tuple[tuple[int, int, int], int]:
    """A light, slightly tinted background and the amplitude of its grain (mostly none)."""
    level = 222 + int(rng.random() * 30)
    tint = (level + int(rng.random() * 4), level + int(rng.random() * 4), level)
    return tint, (int(rng.random() * 4) + 2 if rng.random() < 0.15 else 0)


def sample_thing(rng: np.random.Generator, cell: int) -> Thing:
    """A thing of random shape, colour and size in `cell`, kept inside the image."""
    size = MIN_SIZE + rng.random() * (MAX_SIZE - MIN_SIZE)
    row, column = divmod(cell, 3)
    x = (column + 0.5) / 3 + (rng.random() * 2 - 1) * JITTER
    y = (row + 0.5) / 3 + (rng.random() * 2 - 1) * JITTER
    half = size / 2
    x, y = min(1 - half, max(half, x)), min(1 - half, max(half, y))
    return Thing(cell, pick(rng, SHAPES), pick(rng, COLOUR_NAMES), x, y, size)


# How many things a training scene holds: three and four come more often, because naming just any
# object of the picture pays least there. Held-out scenes hold 1-4 equally often. Our choice.
TRAINING_COUNTS = {"1": 0.15, "2": 0.2, "3": 0.3, "4": 0.35}


def sample_scene(
    rng: np.random.Generator, *, heldout: bool = False, num_things: int | None = None
) -> Scene:
    """A scene of 1-4 things whose layout lies on the asked side of the split."""
    if num_things is not None:
        num = num_things
    elif heldout:
        num = 1 + int(rng.random() * MAX_THINGS)
    else:
        num = int(pick_weighted(rng, TRAINING_COUNTS))
    if not 1 <= num <= len(CELLS):
        raise ValueError(f"num_things is {num}; a scene holds 1 to {len(CELLS)} things")
    background, noise = sample_background(rng)
    while True:
        cells = sorted(int(c) for c in rng.permutation(9)[:num])
        scene = Scene(tuple(sample_thing(rng, cell) for cell in cells), background, noise)
        if in_heldout(scene.key()) == heldout:
            return scene
