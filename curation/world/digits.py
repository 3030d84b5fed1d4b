"""Real handwritten digits (scikit-learn's 8x8 scans), enlarged and placed on a light sheet."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from curation.world.draw import add_grain, package_file
from curation.world.scene import JITTER, in_heldout, sample_background

INKS = ((20, 20, 20), (25, 40, 130), (120, 25, 30))


@lru_cache(maxsize=1)
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """uint8 scans [1797, 8, 8] and their digits, straight from the file the wheel ships.

    `sklearn.datasets` would import SciPy and half of scikit-learn for the same table.
    """
    with gzip.open(package_file("sklearn", "datasets/data/digits.csv.gz"), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    return np.minimum(table[:, :64].reshape(-1, 8, 8) * 16, 255).astype(np.uint8), table[:, 64]


@lru_cache(maxsize=4)
def _instances(heldout: bool) -> tuple[tuple[int, ...], ...]:
    """Scan indices per digit 0-9, of the asked side of the split."""
    _, targets = _scans()
    side = [i for i in range(len(targets)) if in_heldout(f"digit:{i}") == heldout]
    return tuple(tuple(i for i in side if targets[i] == digit) for digit in range(10))


@lru_cache(maxsize=2048)
def _mask(instance: int, side: int) -> Image.Image:
    scans, _ = _scans()
    # Some scans touch their frame; an empty pixel around them keeps the enlarged edge soft.
    padded = Image.fromarray(np.pad(scans[instance], 1))
    return padded.resize((side, side), Image.Resampling.BICUBIC)


@dataclass(frozen=True, slots=True)
class DigitImage:
    """One or two digits, left to right. `instances` are scan indices; `size` is a fraction."""

    digits: tuple[int, ...]
    instances: tuple[int, ...]
    centres: tuple[tuple[float, float], ...]
    size: float
    ink: int
    background: tuple[int, int, int]
    noise: int

    def key(self) -> str:
        return "digits:" + ",".join(map(str, self.instances))

    def meta(self) -> dict[str, Any]:
        return {
            "kind": "digits",
            "digits": list(self.digits),
            "instances": list(self.instances),
            "key": self.key(),
        }


def sample_digits(
    rng: np.random.Generator, num_digits: int, *, heldout: bool = False
) -> DigitImage:
    """`num_digits` (1 or 2) scans, each from the asked side of the split."""
    if num_digits not in (1, 2):
        raise ValueError(f"num_digits is {num_digits}; an image holds one or two digits")
    by_digit = _instances(heldout)
    digits = tuple(int(rng.random() * 10) for _ in range(num_digits))
    instances = tuple(by_digit[d][int(rng.random() * len(by_digit[d]))] for d in digits)
    size = ((38 if num_digits == 2 else 50) + rng.random() * 4) / 84
    middles = (0.26, 0.74) if num_digits == 2 else (0.5,)
    centres = tuple(
        (m + (rng.random() * 2 - 1) * JITTER, 0.5 + (rng.random() * 2 - 1) * JITTER)
        for m in middles
    )
    background, noise = sample_background(rng)
    ink = int(rng.random() * len(INKS))
    return DigitImage(digits, instances, centres, size, ink, background, noise)


def draw_digits(item: DigitImage, image_size: int) -> Image.Image:
    """An RGB image of one or two handwritten digits."""
    image = Image.new("RGB", (image_size, image_size), item.background)
    side = round(item.size * image_size)
    for instance, (x, y) in zip(item.instances, item.centres, strict=True):
        mask = _mask(instance, side)
        corner = (round(x * image_size - side / 2), round(y * image_size - side / 2))
        image.paste(INKS[item.ink], corner, mask)
    return add_grain(image, item.noise, item.instances[0])
