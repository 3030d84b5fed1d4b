"""Cut an image into square tiles: dynamic tiling of the released processor. No torch here."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


@lru_cache(maxsize=32)
def candidate_grids(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Every (columns, rows) of 1 to max_tiles tiles, fewest tiles first."""
    grids = {
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles + 1)
        if columns * rows <= max_tiles
    }
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)))


# Most tiles of an image in the authors' evaluation (VLMEvalKit's adapter); 10 where none is named.
TILE_BUDGETS = {
    **dict.fromkeys(("ChartQA", "MMMU", "MME-RealWorld", "VCR", "OCRVQA"), 12),
    **dict.fromkeys(("DocVQA", "DUDE", "MMLongBench-Doc", "SlideVQA"), 18),
    **dict.fromkeys(("InfoVQA", "OCRBench", "HRBench"), 24),
}
DEFAULT_TILE_BUDGET = 10
MAX_TILES_TOGETHER = 64


def tile_budget(benchmark: str, num_images: int = 1) -> int:
    """Most tiles of each image of a question: 64 are shared by all its images (VLMEvalKit)."""
    share = MAX_TILES_TOGETHER // max(1, num_images)
    return max(1, min(TILE_BUDGETS.get(benchmark, DEFAULT_TILE_BUDGET), share))


def choose_grid(
    width: int,
    height: int,
    tile_size: int,
    max_tiles: int,
    other_than: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """The (columns, rows) whose aspect ratio is nearest to the image's.

    On an exact tie the larger grid wins only when the image has more than half its pixels.

    Args:
        width, height: of the image, in pixels.
        tile_size: side of a tile, in pixels.
        max_tiles: most tiles, thumbnail not counted.
        other_than: leave out the grids that divide this one evenly along both sides. When that
            leaves none, the answer is this grid itself.
    """
    aspect = width / height
    best, best_distance = other_than or (1, 1), float("inf")
    for columns, rows in candidate_grids(max_tiles):
        if other_than and other_than[0] % columns == 0 and other_than[1] % rows == 0:
            continue
        distance = abs(aspect - columns / rows)
        large = width * height > 0.5 * tile_size * tile_size * columns * rows
        if distance < best_distance or (distance == best_distance and large):
            best, best_distance = (columns, rows), distance
    return best


def tile_image(
    image: Image.Image,
    tile_size: int,
    max_tiles: int,
    use_thumbnail: bool,
    msac: bool = False,
) -> list[Image.Image]:
    """Tiles row-major, then the whole image once more as the last tile when there are several.

    With `msac` (multi-scale adaptive cropping) the tiles of a second grid stand before the whole
    image: the nearest of those that do not divide the first, so that what one grid cuts apart
    the other may show whole.

    Args:
        image: RGB.
        tile_size: side of a tile, in pixels.
        max_tiles: 1 gives one squeezed tile (video frames, judges).
        use_thumbnail: append the thumbnail.
        msac: cut the image a second time.
    """
    first = choose_grid(image.width, image.height, tile_size, max_tiles)
    tiles = _cut(image, first, tile_size)
    if msac:
        second = choose_grid(image.width, image.height, tile_size, max_tiles, other_than=first)
        tiles += _cut(image, second, tile_size) if second != first else []
    if use_thumbnail and len(tiles) > 1:
        tiles.append(_resize(image, tile_size, tile_size))
    return tiles


def count_tiles(
    width: int, height: int, tile_size: int, max_tiles: int, use_thumbnail: bool, msac: bool = False
) -> int:
    """How many tiles `tile_image` gives for an image of this size."""
    first = choose_grid(width, height, tile_size, max_tiles)
    count = first[0] * first[1]
    if msac:
        second = choose_grid(width, height, tile_size, max_tiles, other_than=first)
        count += second[0] * second[1] if second != first else 0
    return count + (use_thumbnail and count > 1)


def _cut(image: Image.Image, grid: tuple[int, int], tile_size: int) -> list[Image.Image]:
    columns, rows = grid
    resized = _resize(image, columns * tile_size, rows * tile_size)
    return [
        resized.crop((x, y, x + tile_size, y + tile_size))
        for y in range(0, rows * tile_size, tile_size)
        for x in range(0, columns * tile_size, tile_size)
    ]


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)


def to_pixels(tiles: list[Image.Image]) -> np.ndarray:
    """[n, 3, S, S] float32 with ImageNet mean and deviation taken out."""
    stacked = np.stack([np.asarray(tile.convert("RGB")) for tile in tiles])
    return normalise(stacked.transpose(0, 3, 1, 2), channel_axis=1)


def normalise(pixels: np.ndarray, channel_axis: int) -> np.ndarray:
    """Bytes of any layout to float32 with ImageNet mean and deviation taken out, contiguous."""
    shape = [1] * pixels.ndim
    shape[channel_axis] = 3
    # Bytes are moved to their places first: a quarter of what floats would be.
    out = np.ascontiguousarray(pixels) * (1.0 / (255.0 * IMAGENET_STD)).reshape(shape)
    out -= (IMAGENET_MEAN / IMAGENET_STD).reshape(shape)
    return out
