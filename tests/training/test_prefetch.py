"""A stream one batch ahead is the stream itself: the same batches, state and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.test_stream import dataset, make
from training.prefetch import Prefetch
from training.stream import PackedStream


@pytest.fixture
def directories(tmp_path: Path) -> dict[str, Path]:
    return {"a": dataset(tmp_path, "a", 60), "b": dataset(tmp_path, "b", 30)}


def streams(directories: dict[str, Path]) -> PackedStream:
    return make(directories, {"a": 2.0, "b": 1.0})


def ids(stream: Any, count: int) -> list[list[str]]:
    return [stream.next_batch().ids for _ in range(count)]


def test_batches_and_state_are_those_of_the_stream(directories: dict[str, Path]) -> None:
    plain, ahead = streams(directories), Prefetch(streams(directories))
    for _ in range(6):
        assert ahead.next_batch().ids == plain.next_batch().ids
        assert ahead.state() == plain.state()
    ahead.close()


def test_a_batch_that_was_made_ahead_is_neither_lost_nor_seen_twice(
    directories: dict[str, Path],
) -> None:
    expected = ids(streams(directories), 8)
    first = Prefetch(streams(directories))
    taken = ids(first, 3)
    state = first.state()
    first.close()
    second = Prefetch(streams(directories))
    ids(second, 1)  # what it has made ahead must not survive the load
    second.load(state)
    assert taken + ids(second, 5) == expected
    second.close()


def test_an_error_comes_with_the_batch_that_it_belongs_to(directories: dict[str, Path]) -> None:
    stream = streams(directories)
    ahead = Prefetch(stream)
    ids(ahead, 2)

    def fails() -> None:
        raise OSError("the store is away")

    ahead.load(ahead.state())
    stream.next_batch = fails  # type: ignore[method-assign, assignment]
    with pytest.raises(OSError, match="the store is away"):
        ahead.next_batch()
    ahead.close()
