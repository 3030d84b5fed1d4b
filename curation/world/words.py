"""Printed words: a fixed lexicon of short words at jittered positions, sizes and colours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from curation.world.draw import add_grain, font
from curation.world.scene import (
    COLOUR_NAMES,
    COLOURS,
    JITTER,
    in_heldout,
    pick,
    sample_background,
)

LEXICON = (
    "anchor", "bell", "boat", "cape", "crew", "deck", "dock", "fish",
    "gull", "harbor", "hull", "isle", "keel", "mast", "oar", "port",
    "rope", "sail", "sea", "ship", "sun", "tide", "wave", "wind",
)  # fmt: skip
_BINS = 24


@dataclass(frozen=True, slots=True)
class WordImage:
    """One printed word. `x`, `y` is the text's centre and `size` the font size, as fractions."""

    word: str
    colour: str
    x: float
    y: float
    size: float
    background: tuple[int, int, int]
    noise: int

    def key(self) -> str:
        """The layout: word, colour and where it stands, in steps of 1/24 of the image."""
        return f"{self.word}:{self.colour}:{round(self.x * _BINS)}:{round(self.y * _BINS)}"

    def meta(self) -> dict[str, Any]:
        return {"kind": "word", "word": self.word, "colour": self.colour, "key": self.key()}


def sample_word(rng: np.random.Generator, *, heldout: bool = False) -> WordImage:
    """A word placed so that all of it is inside the image, on the asked side of the split."""
    background, noise = sample_background(rng)
    while True:
        word = pick(rng, LEXICON)
        # Six letters at 21/84 of the side are about 70 of 84 pixels wide.
        size = (19 + rng.random() * 2) / 84
        x = 0.5 + (rng.random() * 2 - 1) * JITTER
        y = 0.5 + (rng.random() * 2 - 1) * JITTER
        image = WordImage(word, pick(rng, COLOUR_NAMES), x, y, size, background, noise)
        if in_heldout(image.key()) == heldout:
            return image


def draw_word(item: WordImage, image_size: int) -> Image.Image:
    """An RGB image of one printed word."""
    image = Image.new("RGB", (image_size, image_size), item.background)
    ImageDraw.Draw(image).text(
        (round(item.x * image_size), round(item.y * image_size)),
        item.word,
        font=font(max(6, round(item.size * image_size))),
        fill=COLOURS[item.colour],
        anchor="mm",
    )
    return add_grain(image, item.noise, len(item.word))
