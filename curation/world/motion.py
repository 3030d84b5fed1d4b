"""Short videos: one object moves left, right, up or down over 2-8 frames; others stand still."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from curation.world.draw import draw_things
from curation.world.scene import Thing, in_heldout, sample_background, sample_thing

DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
DIRECTION_NAMES = tuple(DIRECTIONS)
MIN_FRAMES, MAX_FRAMES = 2, 8
# From the first to the last frame the object crosses this share of the image.
MIN_TRAVEL, MAX_TRAVEL = 0.38, 0.66


@dataclass(frozen=True, slots=True)
class Motion:
    """`mover` is where the object stands in the first frame; `travel` is a fraction of the side."""

    mover: Thing
    still: tuple[Thing, ...]
    direction: str
    travel: float
    num_frames: int
    background: tuple[int, int, int]
    noise: int

    def key(self) -> str:
        """The layout: mover, direction, its lane and the things that stand still."""
        lane = self.mover.row if self.direction in ("left", "right") else self.mover.column
        rest = ",".join(f"{t.cell}:{t.name}" for t in self.still)
        return f"motion:{self.mover.name}:{self.direction}:{lane}:{self.num_frames}:{rest}"

    def ends(self) -> tuple[int, int]:
        """The mover's cells in the first and the last frame."""
        dx, dy = DIRECTIONS[self.direction]
        x, y = self.mover.x + dx * self.travel, self.mover.y + dy * self.travel
        return self.mover.cell, min(2, int(y * 3)) * 3 + min(2, int(x * 3))

    def meta(self) -> dict[str, Any]:
        still = [{"cell": t.cell, "shape": t.shape, "colour": t.colour} for t in self.still]
        return {
            "kind": "motion",
            "mover": {"shape": self.mover.shape, "colour": self.mover.colour},
            "still": still,
            "direction": self.direction,
            "travel": round(self.travel, 3),
            "num_frames": self.num_frames,
            "key": self.key(),
        }


def _lane_cells(mover: Thing, direction: str) -> set[int]:
    if direction in ("left", "right"):
        return {mover.row * 3 + c for c in range(3)}
    return {r * 3 + mover.column for r in range(3)}


def sample_motion(
    rng: np.random.Generator, *, heldout: bool = False, travel: float | None = None
) -> Motion:
    """A clip on the asked side of the split. With `travel` 0 nothing moves."""
    while True:
        direction = DIRECTION_NAMES[int(rng.random() * 4)]
        lane = int(rng.random() * 3)
        # The mover starts at the far end of its lane, so that it has room to travel.
        start = {"left": lane * 3 + 2, "right": lane * 3, "up": 6 + lane, "down": lane}[direction]
        mover = sample_thing(rng, start)
        distance = (
            MIN_TRAVEL + rng.random() * (MAX_TRAVEL - MIN_TRAVEL) if travel is None else travel
        )
        half = mover.size / 2
        room = {"left": mover.x, "right": 1 - mover.x, "up": mover.y, "down": 1 - mover.y}
        distance = min(distance, room[direction] - half)
        num_frames = MIN_FRAMES + int(rng.random() * (MAX_FRAMES - MIN_FRAMES + 1))
        free = sorted(set(range(9)) - _lane_cells(mover, direction))
        num_still = (0, 0, 1, 1, 2)[int(rng.random() * 5)]
        cells = sorted(free[int(i)] for i in rng.permutation(len(free))[:num_still])
        still = tuple(sample_thing(rng, cell) for cell in cells)
        background, noise = sample_background(rng)
        if any(t.name == mover.name for t in still):
            continue
        motion = Motion(mover, still, direction, distance, num_frames, background, noise)
        if in_heldout(motion.key()) == heldout:
            return motion


def draw_motion(motion: Motion, image_size: int) -> list[Image.Image]:
    """`num_frames` RGB images, in order."""
    dx, dy = DIRECTIONS[motion.direction]
    m = motion.mover
    frames = []
    for i in range(motion.num_frames):
        step = motion.travel * i / (motion.num_frames - 1)
        moved = Thing(m.cell, m.shape, m.colour, m.x + dx * step, m.y + dy * step, m.size)
        frames.append(
            draw_things((*motion.still, moved), motion.background, motion.noise, image_size)
        )
    return frames
