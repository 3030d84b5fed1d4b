"""AnyRes: an image at its own size, as patches in the order the adapter merges them. No torch here.

Patches come cell by cell: the `downsample` x `downsample` patches of a merged square stand
together, row-major inside it, and the squares are row-major in the image. Then merging is a
reshape whatever the image's shape, and images of all sizes lie end to end.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from model.tiling import normalise

# 1792 x 1792 pixels in 14-pixel patches: "a maximum input length of 16,384" (paper section 6.1).
MAX_PATCHES = 16_384


def native_grid(
    width: int,
    height: int,
    patch_size: int = 14,
    downsample: int = 2,
    max_patches: int = MAX_PATCHES,
) -> tuple[int, int]:
    """The (rows, columns) of patches nearest to the image's size.

    Sides are rounded to whole merged squares (28 pixels in the released model), at least one.
    An image of more than `max_patches` is shrunk with its aspect ratio kept, and its longer side
    cut further where one square is already too wide for that ratio. The paper gives the largest
    size only; the rule is our choice (spec A2).

    Raises:
        ValueError: a side is not positive, or `max_patches` is less than one square.
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels has nothing to look at")
    max_cells = max_patches // downsample**2
    if max_cells < 1:
        raise ValueError(
            f"max_patches {max_patches} is less than one merged square of {downsample**2} patches"
        )
    cell = patch_size * downsample
    rows, columns = (max(1, math.floor(side / cell + 0.5)) for side in (height, width))
    if rows * columns > max_cells:
        shrink = math.sqrt(max_cells / (width * height))  # cells per pixel of a side
        rows, columns = (max(1, math.floor(side * shrink)) for side in (height, width))
        if rows < columns:
            columns = min(columns, max_cells // rows)
        else:
            rows = min(rows, max_cells // columns)
    return rows * downsample, columns * downsample


def to_patches(
    image: Image.Image,
    patch_size: int = 14,
    downsample: int = 2,
    max_patches: int = MAX_PATCHES,
) -> tuple[np.ndarray, tuple[int, int]]:
    """An image's normalised patches and its grid.

    Args:
        image: any mode, any size.

    Returns:
        [rows * columns, 3 * patch_size ** 2] float32, each patch channel by channel, in cell
        order; and (rows, columns).
    """
    rows, columns = native_grid(image.width, image.height, patch_size, downsample, max_patches)
    size = (columns * patch_size, rows * patch_size)
    resized = image.convert("RGB")
    if resized.size != size:
        resized = resized.resize(size, Image.Resampling.BICUBIC)
    cells = np.asarray(resized).reshape(
        rows // downsample,
        downsample,
        patch_size,
        columns // downsample,
        downsample,
        patch_size,
        3,
    )
    # cell row, cell column, row in cell, column in cell, channel, y, x
    patches = normalise(cells.transpose(0, 3, 1, 4, 6, 2, 5), channel_axis=4)
    return patches.reshape(rows * columns, 3 * patch_size * patch_size), (rows, columns)


def cell_order(rows: int, columns: int, downsample: int = 2) -> np.ndarray:
    """[rows * columns] int64: for each place in cell order, the row-major number of its patch."""
    index = np.arange(rows * columns).reshape(
        rows // downsample, downsample, columns // downsample, downsample
    )
    return index.transpose(0, 2, 1, 3).reshape(-1)
