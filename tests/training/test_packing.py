"""Packing: rows without padding, nobody starves, nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.processor import Encoded
from training.packing import IGNORE_INDEX, collate_rows, fill_row, pack_rows, truncated


def encoded(length: int, first_id: int = 1, num_tiles: int = 0) -> Encoded:
    ids = np.arange(first_id, first_id + length, dtype=np.int64)
    pixels = np.full((num_tiles, 3, 4, 4), first_id, dtype=np.float32)
    return Encoded(ids, np.ones(length, dtype=bool), pixels)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=60))
def test_first_fit_places_every_sample_once_within_the_row(lengths: list[int]) -> None:
    rows = pack_rows(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)


def test_a_sample_longer_than_the_row_is_named() -> None:
    with pytest.raises(ValueError, match="sample 1 has 65 tokens"):
        pack_rows([3, 65], 64)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=40))
def test_a_filled_row_takes_the_oldest_and_fits(lengths: list[int]) -> None:
    chosen = fill_row(lengths, 64)
    assert chosen[0] == 0
    assert len(set(chosen)) == len(chosen)
    assert sum(lengths[i] for i in chosen) <= 64
    left = 64 - sum(lengths[i] for i in chosen)
    assert all(lengths[i] > left for i in range(len(lengths)) if i not in chosen)


def test_collated_samples_keep_their_own_positions_and_segments() -> None:
    batch = collate_rows([[encoded(3, 10, 1), encoded(2, 20)], [encoded(4, 30, 2)]], 6)
    assert batch["input_ids"][0].tolist() == [10, 11, 12, 20, 21, 0]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 0, 1, 0]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]]
    # A sample's first token has no past of its own, so it carries no loss.
    assert batch["labels"][0].tolist() == [IGNORE_INDEX, 11, 12, IGNORE_INDEX, 21, IGNORE_INDEX]
    assert batch["images"]["pixel_values"] is not None
    assert batch["images"]["pixel_values"][:, 0, 0, 0].tolist() == [10, 30, 30]


def slow_fill_row(lengths: list[int], seq_len: int) -> list[int]:
    """The rule of `fill_row` word by word: the oldest, then always the longest that fits."""
    chosen, space = [0], seq_len - lengths[0]
    rest = set(range(1, len(lengths)))
    while fitting := [i for i in rest if lengths[i] <= space]:
        best = max(fitting, key=lambda i: (lengths[i], -i))
        chosen.append(best)
        rest.remove(best)
        space -= lengths[best]
    return chosen


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=60))
def test_a_row_is_filled_by_the_longest_that_fits_the_oldest_first(lengths: list[int]) -> None:
    assert fill_row(lengths, 64) == slow_fill_row(lengths, 64)


def test_a_cut_keeps_images_whole_and_something_to_learn() -> None:
    image = 7
    ids = np.array([1, image, image, 2, 3, 4, 5], dtype=np.int64)
    mask = np.array([0, 0, 0, 0, 1, 1, 1], dtype=bool)
    whole = Encoded(ids, mask, np.zeros((1, 3, 4, 4), dtype=np.float32))
    kept = truncated(whole, 5, image)
    assert kept is not None
    assert kept.input_ids.tolist() == [1, image, image, 2, 3]
    assert kept.loss_mask.sum() == 1
    assert len(kept.pixel_values) == 1
    early = Encoded(
        np.array([1, 2, image, image, 3]), np.array([0, 1, 0, 0, 1], bool), kept.pixel_values
    )
    assert truncated(early, 2, image) is None  # before the image
    assert truncated(early, 3, image) is None  # through it
    assert truncated(early, 4, image) is not None
    assert truncated(whole, 4, image) is None  # no answer left
