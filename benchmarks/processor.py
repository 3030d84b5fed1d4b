"""Images to pixels: the processor's tiling on one core, against a tile-by-tile pipeline.

The pipeline is what image processors commonly do (and the released one): resize, cut, then for
each tile convert, scale to 0-1, subtract the mean, divide by the deviation, and stack at the end.
Ours normalises all tiles at once with one multiplication. Results are compared, the two take
turns, and the ratio is the median of those of one turn. PIL's resize is the same in both, so the
share of time that it takes bounds what can be won.

    python -m benchmarks.processor --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from model.patches import to_patches
from model.tiling import IMAGENET_MEAN, IMAGENET_STD, choose_grid, tile_image, to_pixels

SIZES = ((640, 480), (700, 700), (1700, 2200), (900, 650))  # photograph, web, page, chart


def draw_images(count: int, seed: int) -> list[Image.Image]:
    """Noise in the sizes of common sources, in turn."""
    rng = np.random.default_rng(seed)
    sizes = [SIZES[number % len(SIZES)] for number in range(count)]
    return [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in sizes
    ]


def ours(image: Image.Image, tile_size: int, max_tiles: int) -> np.ndarray:
    """[n, 3, S, S] as the processor makes it."""
    return to_pixels(tile_image(image, tile_size, max_tiles, use_thumbnail=True))


def tile_by_tile(image: Image.Image, tile_size: int, max_tiles: int) -> np.ndarray:
    """The same, one step and one tile at a time."""
    columns, rows = choose_grid(image.width, image.height, tile_size, max_tiles)
    size = (columns * tile_size, rows * tile_size)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    tiles = []
    for number in range(columns * rows):
        x, y = number % columns * tile_size, number // columns * tile_size
        tiles.append(resized.crop((x, y, x + tile_size, y + tile_size)))
    if len(tiles) > 1:
        tiles.append(image.resize((tile_size, tile_size), Image.Resampling.BICUBIC))
    arrays = []
    for tile in tiles:
        array = np.asarray(tile.convert("RGB")).astype(np.float32) / 255.0
        array = (array - IMAGENET_MEAN) / IMAGENET_STD
        arrays.append(array.transpose(2, 0, 1))
    return np.stack(arrays)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processor", description=__doc__)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tile-size", type=int, default=448)
    parser.add_argument("--max-tiles", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    images = draw_images(args.images, args.seed)
    ways: dict[str, Callable[[Image.Image], object]] = {
        "tiles": lambda image: ours(image, args.tile_size, args.max_tiles),
        "tile_by_tile": lambda image: tile_by_tile(image, args.tile_size, args.max_tiles),
        "any_resolution": to_patches,
    }
    difference = max(
        float(np.abs(ours(i, args.tile_size, 10) - tile_by_tile(i, args.tile_size, 10)).max())
        for i in images[: len(SIZES)]
    )
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            start = time.process_time()  # of this process alone: one core, whoever else is busy
            for image in images:
                way(image)
            seconds[name].append(time.process_time() - start)
    pairs = zip(seconds["tile_by_tile"], seconds["tiles"], strict=True)
    rates = {name: len(images) / statistics.median(times) for name, times in seconds.items()}
    result = {
        "images_per_second_per_core": rates,
        "tiles_of_an_image": statistics.mean(
            len(tile_image(i, args.tile_size, args.max_tiles, True)) for i in images[: len(SIZES)]
        ),
        "tiles_are_faster_by": statistics.median(slow / fast for slow, fast in pairs),
        "largest_difference_of_a_pixel": difference,
    }
    if args.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    for name, rate in rates.items():
        print(f"{name:15} {rate:8.2f} images/s on one core")
    print(f"tiles are {result['tiles_are_faster_by']:.2f}x as fast as tile by tile")


if __name__ == "__main__":
    main()
