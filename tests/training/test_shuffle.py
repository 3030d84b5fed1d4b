"""Order of a dataset: every sample once an epoch, a few shards at a time, known at any place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from training.shuffle import BLOCK_SHARDS, BlockShuffle

ROWS = [7, 3, 0, 8, 5, 5, 1, 9, 4, 6, 2]
NUM = sum(ROWS)
SHARD_OF = np.repeat(np.arange(len(ROWS)), ROWS)


def shuffle(
    rows: Sequence[int] = ROWS,
    opening: np.ndarray | None = None,
    told: list[list[int]] | None = None,
) -> BlockShuffle:
    told = [] if told is None else told
    return BlockShuffle(rows, (5, 1), opening, lambda shards: told.append(list(shards)))


def test_an_epoch_holds_every_sample_once_and_the_next_has_another_order() -> None:
    order = shuffle()
    epochs = [[order.sample_at(epoch * NUM + i) for i in range(NUM)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(NUM)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_any_place_is_known_without_what_stood_before() -> None:
    order = shuffle()
    whole = [order.sample_at(i) for i in range(3 * NUM)]
    for place in (2 * NUM + 5, 3, NUM - 1, NUM, 17):
        assert shuffle().sample_at(place) == order.sample_at(place) == whole[place]


def test_only_the_shards_of_one_block_are_read_and_those_of_the_next_are_announced() -> None:
    told: list[list[int]] = []
    order = shuffle(told=told)
    read_since: list[set[int]] = []
    for i in range(2 * NUM):
        shard = int(SHARD_OF[order.sample_at(i)])
        if len(read_since) < len(told):
            read_since.append(set())
        read_since[-1].add(shard)
        assert shard in told[-1]
        assert len(told[-1]) <= 2 * BLOCK_SHARDS
    assert len(told) == 6  # three blocks an epoch
    for now, after in zip(told[:2], read_since[1:3], strict=True):
        assert after <= set(now)
    # Shards that were neighbours are not: they are shuffled, too.
    assert read_since[0] != {s for s in range(BLOCK_SHARDS) if ROWS[s]}


def test_a_dataset_of_one_block_is_shuffled_as_a_whole() -> None:
    order = shuffle([40, 30, 30])
    for epoch in range(2):
        expected = np.random.default_rng([5, 1, epoch]).permutation(100).tolist()
        assert [order.sample_at(epoch * 100 + i) for i in range(100)] == expected


def test_opening_samples_come_first_in_the_first_epoch_only() -> None:
    opening = np.arange(NUM) % 3 == 0
    order = shuffle(opening=opening)
    first = [order.sample_at(i) for i in range(NUM)]
    assert opening[first].tolist() == sorted(opening.tolist(), reverse=True)
    assert sorted(first) == list(range(NUM))
    second = [order.sample_at(NUM + i) for i in range(NUM)]
    assert sorted(second) == list(range(NUM))
    assert not opening[second[: opening.sum()]].all()
