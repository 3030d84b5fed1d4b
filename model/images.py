"""Images of a conversation to arrays: tiles, or patches at their own size. No torch here.

What an image will be as arrays follows from its size alone, so a conversation can be laid out
(`plan_tiles`, `plan_patches`) before any image of it is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from model.patches import native_grid, to_patches
from model.tiling import count_tiles, tile_image, to_pixels


class SeenImages(NamedTuple):
    """Pixels of all images, in order.

    Attributes:
        pixel_values: [num_tiles, 3, S, S] or [num_patches, 3 * p * p] float32.
        image_grids: rows and columns of patches, [N, 2] int64; None for tiles.
        num_tokens: language tokens of each image.
    """

    pixel_values: np.ndarray
    image_grids: np.ndarray | None
    num_tokens: list[int]


def unseen(shape: tuple[int, ...]) -> np.ndarray:
    """NaN in the given shape and without memory: a network that were given it would say so."""
    return np.broadcast_to(np.float32(np.nan), shape)


def plan_tiles(
    sizes: Sequence[tuple[int, int]],
    tile_size: int,
    tokens_per_tile: int,
    max_tiles: int,
    use_thumbnail: bool,
    msac: bool,
) -> SeenImages:
    """As `see_tiles` for images of these widths and heights, with `unseen` pixels."""
    counts = [count_tiles(*size, tile_size, max_tiles, use_thumbnail, msac) for size in sizes]
    pixels = unseen((sum(counts), 3, tile_size, tile_size))
    return SeenImages(pixels, None, [count * tokens_per_tile for count in counts])


def plan_patches(
    sizes: Sequence[tuple[int, int]], patch_size: int, downsample: int, max_patches: int
) -> SeenImages:
    """As `see_patches` for images of these widths and heights, with `unseen` pixels."""
    grids = np.array(
        [native_grid(*size, patch_size, downsample, max_patches) for size in sizes], dtype=np.int64
    ).reshape(-1, 2)
    counts = grids.prod(axis=1)
    pixels = unseen((int(counts.sum()), 3 * patch_size**2))
    return SeenImages(pixels, grids, (counts // downsample**2).tolist())


def see_tiles(
    images: Sequence[Image.Image],
    tile_size: int,
    tokens_per_tile: int,
    max_tiles: int,
    use_thumbnail: bool,
    msac: bool,
) -> SeenImages:
    """Each image as square tiles (`tiling.tile_image`)."""
    tiles = [tile_image(image, tile_size, max_tiles, use_thumbnail, msac) for image in images]
    flat = [tile for image_tiles in tiles for tile in image_tiles]
    pixels = to_pixels(flat) if flat else np.zeros((0, 3, tile_size, tile_size), dtype=np.float32)
    return SeenImages(pixels, None, [len(image_tiles) * tokens_per_tile for image_tiles in tiles])


def see_patches(
    images: Sequence[Image.Image], patch_size: int, downsample: int, max_patches: int
) -> SeenImages:
    """Each image at its own size (`patches.to_patches`)."""
    seen = [to_patches(image, patch_size, downsample, max_patches) for image in images]
    blank = np.zeros((0, 3 * patch_size**2), dtype=np.float32)
    pixels = np.concatenate([blank, *(patches for patches, _ in seen)])
    grids = np.array([grid for _, grid in seen], dtype=np.int64).reshape(-1, 2)
    return SeenImages(pixels, grids, [len(patches) // downsample**2 for patches, _ in seen])


def flatten_images(images: Any) -> list[Image.Image]:
    """None, an image, or lists of images, as deep as they come, to one list.

    Raises:
        TypeError: something in it is no PIL image.
    """
    if images is None:
        return []
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, (list, tuple)):
        return [image for part in images for image in flatten_images(part)]
    raise TypeError(f"an image must be a PIL image, got {type(images).__name__}")
