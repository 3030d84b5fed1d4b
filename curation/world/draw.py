"""Rendering: scenes, printed words, handwritten digits. Everything ends as a small PNG.

Shapes are drawn at twice the size and reduced, which is the cheapest smooth edge; PNGs have a
writer of their own, because at 84 pixels encoding costs more than drawing.
"""

from __future__ import annotations

import importlib.util
import math
import struct
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from curation.world.scene import COLOURS, Scene, Thing

OVERSAMPLE = 2
NUM_GRAINS = 16
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def package_file(package: str, name: str) -> Path:
    """A data file inside an installed package, found without importing the package.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"{package} lends the small world real data: install the extra [train]"
        )
    return Path(spec.origin).parent / name


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def encode(image: Image.Image) -> bytes:
    """PNG bytes of an RGB image, equal for equal pixels.

    Every row is filtered "up" and deflated at level 1: half the time of Pillow's encoder, which
    tries all filters, and at most a few percent larger.
    """
    pixels = np.asarray(image)
    height, width, _ = pixels.shape
    flat = pixels.reshape(height, 3 * width)
    rows = np.empty((height, 1 + 3 * width), dtype=np.uint8)
    rows[:, 0] = 2  # the filter's number, before each row
    rows[0, 1:] = flat[0]
    np.subtract(flat[1:], flat[:-1], out=rows[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(rows.tobytes(), 1)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


@lru_cache(maxsize=256)
def _grain(size: int, amplitude: int, index: int) -> Image.Image:
    rng = np.random.default_rng([size, amplitude, index])
    return Image.fromarray(rng.integers(0, 2 * amplitude, (size, size, 3), dtype=np.uint8))


def add_grain(image: Image.Image, amplitude: int, index: int = 0) -> Image.Image:
    """Mild per-pixel noise from a fixed bank of fields; `amplitude` 0 returns the image itself."""
    if amplitude == 0:
        return image
    field = _grain(image.width, amplitude, index % NUM_GRAINS)
    return ImageChops.subtract(image, field, scale=1, offset=amplitude)


def draw_shape(
    canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, size: float, fill: tuple[int, ...]
) -> None:
    """One shape centred at (x, y) with side `size`, in canvas pixels."""
    h = size / 2
    if shape == "circle":
        canvas.ellipse((x - h, y - h, x + h, y + h), fill=fill)
    elif shape == "square":
        canvas.rectangle((x - h, y - h, x + h, y + h), fill=fill)
    elif shape == "triangle":
        canvas.polygon([(x, y - h), (x + h, y + h), (x - h, y + h)], fill=fill)
    elif shape == "cross":
        arm = size / 6
        canvas.rectangle((x - h, y - arm, x + h, y + arm), fill=fill)
        canvas.rectangle((x - arm, y - h, x + arm, y + h), fill=fill)
    else:
        raise ValueError(f"unknown shape {shape!r}")


def draw_things(
    things: tuple[Thing, ...], background: tuple[int, int, int], noise: int, image_size: int
) -> Image.Image:
    """An RGB image of `things`, `image_size` pixels a side."""
    side = image_size * OVERSAMPLE
    image = Image.new("RGB", (side, side), background)
    canvas = ImageDraw.Draw(image)
    for t in things:
        draw_shape(canvas, t.shape, t.x * side, t.y * side, t.size * side, COLOURS[t.colour])
    grain_index = int(math.fsum(t.x * 1000 for t in things))
    return add_grain(image.reduce(OVERSAMPLE), noise, grain_index)


def draw_scene(scene: Scene, image_size: int) -> Image.Image:
    """An RGB image of a scene, `image_size` pixels a side."""
    return draw_things(scene.things, scene.background, scene.noise, image_size)


@lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own bundled FreeType font: the same glyphs on every machine."""
    loaded = ImageFont.load_default(size)
    assert isinstance(loaded, ImageFont.FreeTypeFont)
    return loaded
