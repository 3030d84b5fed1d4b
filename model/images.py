"""Images of a conversation to arrays: tiles, or patches at their own size. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from model.patches import to_patches
from model.tiling import tile_image, to_pixels


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
