"""Tile grids against a brute-force statement of the rule, and the tiles themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from model.tiling import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    choose_grid,
    tile_budget,
    tile_image,
    to_pixels,
)
from tests.model.tiny import image


def brute_force_grids(width: int, height: int, size: int, max_tiles: int) -> set[tuple[int, int]]:
    """Every grid the rule allows: nearest ratio, the largest that the image fills by half.

    Distances are those of floating point, as in the released code: where two grids are equally
    far on paper (1x2 and 1x3 for 800 x 1920), its rounding decides. Grids of equal tile count and
    equal distance (2x1 and 1x2 for a ratio between them) are all allowed.
    """
    grids = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles + 1)]
    grids = [g for g in grids if g[0] * g[1] <= max_tiles]
    distance = {g: abs(width / height - g[0] / g[1]) for g in grids}
    nearest = [g for g in grids if distance[g] == min(distance.values())]
    smallest = min(c * r for c, r in nearest)
    filled = [g for g in nearest if width * height * 2 > size * size * g[0] * g[1]]
    wanted = max([c * r for c, r in filled] + [smallest])
    return {g for g in nearest if g[0] * g[1] == wanted}


@given(
    width=st.integers(1, 4000),
    height=st.integers(1, 4000),
    size=st.sampled_from([56, 84, 448]),
    max_tiles=st.integers(1, 12),
)
def test_grid_is_the_brute_force_one(width, height, size, max_tiles):
    allowed = brute_force_grids(width, height, size, max_tiles)
    assert choose_grid(width, height, size, max_tiles) in allowed


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [
        (448, 448, (1, 1)),
        (800, 800, (2, 2)),  # 640,000 pixels are more than half of 4 tiles, not of 9
        (600, 600, (1, 1)),
        (1000, 1000, (3, 3)),
        (896, 448, (2, 1)),
        (448, 1344, (1, 3)),
        (4000, 100, (10, 1)),
    ],
)
def test_known_grids(width, height, grid):
    assert choose_grid(width, height, 448, 10) == grid


def test_tiles_are_row_major_and_the_thumbnail_is_last():
    colours = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    picture = Image.fromarray(
        np.repeat(np.repeat(colours, 56, axis=0), 56, axis=1)[..., None].repeat(3, axis=2)
    )
    tiles = tile_image(picture, 56, 6, use_thumbnail=True)
    assert [tile.getpixel((28, 28))[0] for tile in tiles[:-1]] == [0, 40, 80, 120, 160, 200]
    assert len(tiles) == 7
    assert tiles[-1].getpixel((0, 0))[0] < 20
    assert tiles[-1].getpixel((55, 55))[0] > 180
    assert len(tile_image(picture, 56, 6, use_thumbnail=False)) == 6


def test_a_single_tile_has_no_thumbnail_and_one_tile_squeezes():
    assert len(tile_image(image(0), 56, 4, use_thumbnail=True)) == 1
    squeezed = tile_image(image(0, 200, 50), 56, 1, use_thumbnail=True)
    assert [tile.size for tile in squeezed] == [(56, 56)]


def test_pixels_are_imagenet_normalised():
    tile = image(0)
    pixels = to_pixels([tile])
    expected = (np.asarray(tile) / 255.0 - IMAGENET_MEAN) / IMAGENET_STD
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[0].transpose(1, 2, 0), expected, atol=1e-5)


SIDES = [1, 27, 50, 224, 336, 447, 448, 449, 640, 800, 896, 1080, 1344, 1920, 3580]


@pytest.mark.parametrize("max_tiles", [6, 10, 12, 24])
def test_a_table_of_sizes(max_tiles):
    for width in SIDES:  # 225 sizes
        for height in SIDES:
            allowed = brute_force_grids(width, height, 448, max_tiles)
            assert choose_grid(width, height, 448, max_tiles) in allowed, (width, height)


@pytest.mark.parametrize(
    ("width", "height", "first", "second"),
    [
        (800, 800, (2, 2), (3, 3)),
        (1344, 448, (3, 1), (6, 2)),
        (448, 448, (1, 1), (2, 2)),
    ],
)
def test_msac_cuts_a_second_time_with_a_grid_that_does_not_divide_the_first(
    width, height, first, second
):
    assert choose_grid(width, height, 448, 12) == first
    chosen = choose_grid(width, height, 448, 12, other_than=first)
    assert first[0] % chosen[0] or first[1] % chosen[1]
    assert chosen == second
    picture = image(0, width // 8, height // 8)
    tiles = tile_image(picture, 56, 12, use_thumbnail=True, msac=True)
    plain = tile_image(picture, 56, 12, use_thumbnail=False)
    assert len(tiles) == first[0] * first[1] + second[0] * second[1] + 1
    assert [tile.tobytes() for tile in tiles[: len(plain)]] == [tile.tobytes() for tile in plain]
    assert tiles[-1].tobytes() == picture.resize((56, 56), Image.Resampling.BICUBIC).tobytes()


def test_msac_needs_a_second_grid():
    assert len(tile_image(image(0), 56, 1, use_thumbnail=True, msac=True)) == 1


def test_tile_budgets_are_shared():
    assert [tile_budget(name) for name in ("MMStar", "ChartQA", "DocVQA", "OCRBench")] == [
        10,
        12,
        18,
        24,
    ]
    assert [tile_budget("OCRBench", n) for n in (1, 4, 16, 100)] == [24, 16, 4, 1]
