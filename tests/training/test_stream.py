"""The stream: mixed by weight, every sample once per epoch, resumable anywhere."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.processor import Encoded
from sailyard.samples import Sample, read_samples, write_samples
from sailyard.stage import Rank
from training.packing import truncated
from training.stream import PackedStream, open_sources


def dataset(directory: Path, name: str, count: int, longest: int = 40) -> Path:
    rng = np.random.default_rng(count)
    samples = [
        Sample(
            id=f"{name}-{i}",
            source=name,
            task="text",
            messages=[
                {"role": "user", "content": "x" * int(rng.integers(1, longest))},
                {"role": "assistant", "content": "y"},
            ],
            images=[],
        )
        for i in range(count)
    ]
    write_samples(directory / name, samples)
    return directory / name


def encode(sample: Sample) -> Encoded:
    length = len(sample.messages[0]["content"]) + 1
    none = np.zeros((0, 3, 4, 4), dtype=np.float32)
    return Encoded(np.ones(length, dtype=np.int64), np.ones(length, dtype=bool), none)


def make(
    directories: dict[str, Path], weights: dict[str, float] | None = None, seq_len: int = 64
) -> PackedStream:
    return PackedStream(
        open_sources(directories, weights),
        encode,
        seq_len=seq_len,
        batch_size=2,
        look_ahead=12,
        seed=5,
    )


def test_an_epoch_shows_every_sample_once(tmp_path: Path) -> None:
    stream = make({"a": dataset(tmp_path, "a", 50)})
    seen: Counter[str] = Counter()
    while sum(seen.values()) < 50:
        seen.update(stream.next_batch().ids)
    # The look-ahead reaches into the second epoch before the first is drained, by its depth.
    assert len(seen) >= 50 - 12
    assert max(seen.values()) <= 2


def test_samples_of_the_first_tasks_open_the_first_epoch_only(tmp_path: Path) -> None:
    directory = dataset(tmp_path, "a", 60)
    samples = list(read_samples(directory))
    for sample in samples[::3]:
        sample.task = "colour"
    first = {sample.id for sample in samples[::3]}
    write_samples(tmp_path / "b", samples)
    (source,) = open_sources({"b": tmp_path / "b"}, first_tasks=["colour"])
    stream = PackedStream([source], encode, seq_len=64, batch_size=1, look_ahead=1, seed=5)
    drawn = [i for _ in range(120) for i in stream.next_batch().ids]
    assert set(drawn[:20]) == first
    assert len(set(drawn[:60])) == 60
    assert set(drawn[60:80]) != first


def test_sources_are_drawn_by_weight(tmp_path: Path) -> None:
    a, b = dataset(tmp_path, "a", 30), dataset(tmp_path, "b", 300)
    stream = make({"a": a, "b": b}, {"a": 1, "b": 1})
    names = [i.split("-")[0] for _ in range(40) for i in stream.next_batch().ids]
    assert 0.45 < names.count("a") / len(names) < 0.55


def test_a_resumed_stream_continues_exactly(tmp_path: Path) -> None:
    directories = {"a": dataset(tmp_path, "a", 23), "b": dataset(tmp_path, "b", 37)}
    whole = make(directories)
    expected = [whole.next_batch().ids for _ in range(30)]
    for cuts in ((1, 2), (7, 19), (11, 12)):
        stream, seen = make(directories), []
        for step in range(30):
            if step in cuts:  # stopped and started again, twice
                state = stream.state()
                stream = make(directories)
                stream.load(state)
            seen.append(stream.next_batch().ids)
        assert seen == expected
        assert stream.stats.summary() == whole.stats.summary()


def test_too_long_samples_are_counted_and_the_rest_trains(tmp_path: Path) -> None:
    stream = make({"a": dataset(tmp_path, "a", 40)}, seq_len=32)
    for _ in range(20):
        stream.next_batch()
    assert stream.num_too_long > 0


def test_when_nothing_fits_the_way_out_is_named(tmp_path: Path) -> None:
    directory = dataset(tmp_path, "a", 10, longest=40)
    with pytest.raises(ValueError, match="raise seq_len"):
        make({"a": directory}, seq_len=1).next_batch()


def test_ranks_see_the_same_stream_and_decode_their_own_rows(tmp_path: Path) -> None:
    directory = dataset(tmp_path, "a", 40)

    def pixels(stream: PackedStream) -> list[list[float]]:
        rows = stream.next_batch().rows
        return [[float(e.pixel_values.sum()) for e in row] for row in rows]

    def decode(sample: Sample, encoded: Encoded) -> Encoded:
        number = float(sample.id.split("-")[1])
        return replace(encoded, pixel_values=np.full((1, 3, 4, 4), number / 48, dtype=np.float32))

    def of_rank(rank: Rank, workers: int) -> PackedStream:
        return PackedStream(
            open_sources({"a": directory}),
            encode,
            seq_len=64,
            batch_size=4,
            look_ahead=12,
            seed=5,
            decode=decode,
            rank=rank,
            workers=workers,
        )

    alone = of_rank(Rank(), 1)
    first, second = of_rank(Rank(0, 2), 3), of_rank(Rank(1, 2), 1)
    for _ in range(5):
        whole, left, right = (pixels(stream) for stream in (alone, first, second))
        assert left[:2] == whole[:2]
        assert right[2:] == whole[2:]
        assert all(value == 0 for rows in (left[2:], right[:2]) for row in rows for value in row)
    assert first.state() == second.state() == alone.state()


def test_a_stream_over_many_blocks_continues_exactly(tmp_path: Path) -> None:
    samples = list(read_samples(dataset(tmp_path, "a", 90)))
    write_samples(tmp_path / "b", samples, shard_size=4)
    directories = {"a": tmp_path / "b"}
    whole = make(directories)
    expected = [whole.next_batch().ids for _ in range(20)]
    assert {i for ids in expected for i in ids} == {sample.id for sample in samples}
    stream, seen = make(directories), []
    for _ in range(20):
        state = stream.state()
        stream.close()
        stream = make(directories)
        stream.load(json.loads(json.dumps(state)))
        seen.append(stream.next_batch().ids)
    assert seen == expected


def test_weights_must_name_inputs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights name"):
        open_sources({"a": dataset(tmp_path, "a", 3)}, {"b": 1.0})


def test_first_tasks_must_be_tasks_of_an_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"first_tasks names \['colur'\]"):
        open_sources({"a": dataset(tmp_path, "a", 3)}, first_tasks=["colur"])


def test_too_long_samples_are_cut_where_the_rule_says_so(tmp_path: Path) -> None:
    directory = dataset(tmp_path, "a", 40)
    whole = make({"a": directory}, seq_len=32)
    stream = PackedStream(
        open_sources({"a": directory}),
        encode,
        seq_len=32,
        batch_size=2,
        look_ahead=12,
        seed=5,
        truncate=lambda e: truncated(e, 32, image_token_id=7),
    )
    for _ in range(20):
        whole.next_batch()
        stream.next_batch()
    assert whole.num_too_long > 0
    assert whole.num_truncated == stream.num_too_long == 0
    assert stream.num_truncated > 0
    assert set(stream.too_long) <= {f"a-{i}" for i in range(40)}
    again = make({"a": directory}, seq_len=32)
    again.load(whole.state())
    assert again.too_long == whole.too_long
