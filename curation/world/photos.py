"""Real photographs that ship inside scikit-image's wheel, cut into many small crops.

A crop's window (scale and position on a fixed grid) decides its side of the split: held-out
questions show windows that training never shows, of the same photographs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from curation.world.draw import package_file
from curation.world.scene import in_heldout, pick

# Answer -> (file in skimage/data, smallest crop as a share of the short side, (left, top, right,
# bottom) of the part worth showing, as fractions). Objects keep most of their frame; textures
# are recognisable in any part.
PHOTOS: dict[str, tuple[str, float, tuple[float, float, float, float]]] = {
    "astronaut": ("astronaut.png", 0.65, (0.0, 0.0, 1.0, 1.0)),
    "bricks": ("brick.png", 0.35, (0.0, 0.0, 1.0, 1.0)),
    "camera": ("camera.png", 0.6, (0.1, 0.0, 1.0, 1.0)),
    "cat": ("chelsea.png", 0.7, (0.1, 0.0, 0.9, 1.0)),
    "coffee": ("coffee.png", 0.65, (0.1, 0.0, 0.95, 1.0)),
    "coins": ("coins.png", 0.5, (0.0, 0.0, 1.0, 1.0)),
    "grass": ("grass.png", 0.35, (0.0, 0.0, 1.0, 1.0)),
    "horse": ("horse.png", 0.8, (0.0, 0.0, 1.0, 1.0)),
    "moon": ("moon.png", 0.45, (0.0, 0.0, 1.0, 1.0)),
    "motorcycle": ("motorcycle_left.png", 0.7, (0.1, 0.1, 1.0, 1.0)),
    "retina": ("retina.jpg", 0.6, (0.0, 0.0, 1.0, 1.0)),
    "rocket": ("rocket.jpg", 0.6, (0.2, 0.0, 0.9, 1.0)),
    "stars": ("hubble_deep_field.jpg", 0.3, (0.0, 0.0, 1.0, 1.0)),
    "stones": ("gravel.png", 0.35, (0.0, 0.0, 1.0, 1.0)),
}
NOUNS = tuple(PHOTOS)
_ARTICLES = {"astronaut": "an ", "moon": "the "} | dict.fromkeys(
    ("bricks", "coffee", "coins", "grass", "stars", "stones"), ""
)
_GRID = 12
_LONG_SIDE = 420


def with_article(noun: str) -> str:
    """ "a cat", "an astronaut", "the moon", "coins"."""
    return _ARTICLES.get(noun, "a ") + noun


@dataclass(frozen=True, slots=True)
class PhotoCrop:
    """A square window of one photograph: `scale`, `x`, `y` are steps of 1/12 of their range."""

    noun: str
    scale: int
    x: int
    y: int
    mirrored: bool
    brightness: float

    def key(self) -> str:
        return f"photo:{self.noun}:{self.scale}:{self.x}:{self.y}"

    def meta(self) -> dict[str, Any]:
        return {"kind": "photo", "noun": self.noun, "key": self.key()}


@lru_cache(maxsize=len(PHOTOS))
def _photo(noun: str) -> Image.Image:
    path = package_file("skimage", f"data/{PHOTOS[noun][0]}")
    with Image.open(path) as opened:
        image = opened.convert("RGBA")
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image.getchannel("A"))
    left, top, right, bottom = PHOTOS[noun][2]
    w, h = flat.size
    flat = flat.crop((round(left * w), round(top * h), round(right * w), round(bottom * h)))
    flat.thumbnail((_LONG_SIDE, _LONG_SIDE))
    return flat


def sample_photo(
    rng: np.random.Generator, *, heldout: bool = False, noun: str | None = None
) -> PhotoCrop:
    """A random window on the asked side of the split."""
    while True:
        crop = PhotoCrop(
            noun or pick(rng, NOUNS),
            int(rng.random() * (_GRID + 1)),
            int(rng.random() * (_GRID + 1)),
            int(rng.random() * (_GRID + 1)),
            bool(rng.random() < 0.5),
            0.8 + rng.random() * 0.4,
        )
        if in_heldout(crop.key()) == heldout:
            return crop


def draw_photo(crop: PhotoCrop, image_size: int) -> Image.Image:
    """The window, resized to `image_size` pixels a side."""
    photo = _photo(crop.noun)
    smallest = PHOTOS[crop.noun][1]
    side = min(photo.size) * (smallest + (1 - smallest) * crop.scale / _GRID)
    left = (photo.width - side) * crop.x / _GRID
    top = (photo.height - side) * crop.y / _GRID
    window = (left, top, left + side, top + side)
    image = photo.resize((image_size, image_size), Image.Resampling.BILINEAR, box=window)
    if crop.mirrored:
        image = ImageOps.mirror(image)
    return ImageEnhance.Brightness(image).enhance(crop.brightness)
