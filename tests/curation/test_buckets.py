"""Latent classes: planted clusters are found, the draw is even, the seed decides."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.buckets import draw_evenly, evenness, kmeans


def clusters(sizes: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = np.eye(len(sizes), 8) * 5
    rows = [c + 0.1 * rng.standard_normal((n, 8)) for c, n in zip(centres, sizes, strict=True)]
    return np.concatenate(rows), np.repeat(np.arange(len(sizes)), sizes)


def test_planted_clusters_are_found() -> None:
    rows, truth = clusters((200, 20, 80, 5))
    labels = kmeans(rows, 4, seed=1)
    pairs = {(int(a), int(b)) for a, b in zip(truth, labels, strict=True)}
    assert len(pairs) == 4


def test_the_seed_decides() -> None:
    rows, _ = clusters((60, 60))
    assert (kmeans(rows, 10, 3) == kmeans(rows, 10, 3)).all()


def test_more_buckets_than_different_rows() -> None:
    rows = np.repeat(np.eye(3), 5, axis=0)
    assert len(set(kmeans(rows, 9, 0).tolist())) == 3
    with pytest.raises(ValueError, match="0 rows"):
        kmeans(np.empty((0, 3)), 2, 0)


def test_small_buckets_give_all_they_have() -> None:
    labels = ["a"] * 100 + ["b"] * 3 + ["c"] * 30
    drawn = Counter(labels[i] for i in draw_evenly(labels, 43, 0))
    assert drawn == {"a": 20, "b": 3, "c": 20}


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 80), st.integers(0, 9))
def test_the_draw_is_even_and_without_repetition(labels: list[int], target: int, seed: int) -> None:
    drawn = draw_evenly(labels, target, seed)
    assert len(drawn) == len(set(drawn)) == min(target, len(labels))
    counts = Counter(labels[i] for i in drawn)
    held = Counter(labels)
    fullest = max(counts.values())
    # A bucket that gave less than the fullest by more than one has nothing left.
    assert all(counts[b] >= fullest - 1 or counts[b] == held[b] for b in held)


def test_evenness() -> None:
    assert evenness(["a", "b", "c", "d"], 4) == pytest.approx(1.0)
    assert evenness(["a", "b"], 100) == pytest.approx(1.0)
    assert evenness(["a"] * 99 + ["b"], 2) < 0.1
    assert evenness([], 3) == 1.0
