"""Samples: what is written is what is read, bad ones are named, equal ones give equal bytes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sailyard.samples import (
    ROWS_PER_GROUP,
    SCHEMA,
    BadSample,
    Sample,
    SampleReader,
    count_samples,
    read_samples,
    read_table,
    rows_per_shard,
    write_samples,
)


def make(index: int, **changes: Any) -> Sample:
    fields: dict[str, Any] = {
        "id": f"s{index}",
        "source": "microworld",
        "task": "count",
        "messages": [
            {"role": "user", "content": "<image>\nHow many?"},
            {"role": "assistant", "content": str(index)},
        ],
        "images": [bytes([index % 256]) * (index % 7)],
        "meta": {"answer": str(index), "check": "number"},
    }
    return Sample(**{**fields, **changes})


def test_round_trip_over_several_shards(tmp_path: Path) -> None:
    samples = [make(i) for i in range(250)]
    samples[7] = make(7, messages=[{"role": "user", "content": "Grüße 中文 😀"}], images=[])
    samples[8] = make(
        8,
        messages=[{"role": "user", "content": "Frame-1: <image>\nFrame-2: <image>\nWhere?"}],
        images=[b"one", b"two"],
        is_video=True,
        meta={},
    )
    assert write_samples(tmp_path, iter(samples), shard_size=100) == 250
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "index.json",
        "part-00000.parquet",
        "part-00001.parquet",
        "part-00002.parquet",
    ]
    assert list(read_samples(tmp_path)) == samples
    assert count_samples(tmp_path) == 250
    assert read_table(tmp_path, ["id"]).column("id").to_pylist() == [s.id for s in samples]
    assert read_table(tmp_path).schema.equals(SCHEMA)


def test_shard_size_that_divides_the_count_leaves_no_empty_shard(tmp_path: Path) -> None:
    write_samples(tmp_path, (make(i) for i in range(20)), shard_size=10)
    assert rows_per_shard(tmp_path) == [10, 10]


def test_empty_dataset_is_a_dataset(tmp_path: Path) -> None:
    assert write_samples(tmp_path, []) == 0
    assert list(read_samples(tmp_path)) == []
    assert count_samples(tmp_path) == 0
    assert len(SampleReader(tmp_path)) == 0


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    first = make(1, meta={"a": 1, "b": {"c": 2, "d": 3}})
    second = make(1, meta={"b": {"d": 3, "c": 2}, "a": 1})
    write_samples(tmp_path / "one", [first])
    write_samples(tmp_path / "two", [second])
    name = "part-00000.parquet"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_random_access_matches_the_stream_whatever_the_cache(tmp_path: Path) -> None:
    samples = [make(i) for i in range(3 * ROWS_PER_GROUP + 5)]
    write_samples(tmp_path, samples, shard_size=2 * ROWS_PER_GROUP)
    for cache_bytes in (0, 1 << 30):
        reader = SampleReader(tmp_path, cache_bytes)
        assert len(reader) == len(samples)
        order = [(i * 71) % len(samples) for i in range(len(samples))]
        assert [reader[i] for i in order] == [samples[i] for i in order]
        assert reader[-1] == samples[-1]
        for wrong in (len(samples), -len(samples) - 1):
            with pytest.raises(IndexError, match=f"of a dataset of {len(samples)}"):
                reader[wrong]
    assert copy.deepcopy(reader)[5] == samples[5]


def test_reader_keeps_no_more_than_its_cache(tmp_path: Path) -> None:
    samples = [
        make(i, images=[bytes(10_000)], messages=[{"role": "user", "content": "<image>\n?"}])
        for i in range(4 * ROWS_PER_GROUP)
    ]
    write_samples(tmp_path, samples)
    one_group = pq.read_table(tmp_path / "part-00000.parquet").slice(0, ROWS_PER_GROUP).nbytes
    reader = SampleReader(tmp_path, cache_bytes=2 * one_group + 1000)
    for i in range(0, len(samples), 10):
        reader[i]
    assert len(reader._cache) == 2
    assert reader._cached_bytes == sum(table.nbytes for table in reader._cache.values())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"images": []}, "1 <image> placeholders in its user turns and 0 images"),
        ({"messages": [{"role": "user", "content": "no picture"}]}, "0 <image> placeholders"),
        ({"messages": [{"role": "robot", "content": "x"}], "images": []}, "needs a role of"),
        ({"messages": [{"role": "user"}], "images": []}, "text content"),
        ({"meta": {"x": object()}}, "meta is not JSON"),
        ({"meta": {"x": float("nan")}}, "meta is not JSON"),
    ],
)
def test_bad_sample_is_named(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadSample, match=complaint) as raised:
        write_samples(tmp_path, [make(0), make(41, **changes)])
    assert "'s41'" in str(raised.value)


def test_placeholder_in_an_answer_needs_no_image(tmp_path: Path) -> None:
    answer = [{"role": "assistant", "content": "the tag <image> means a picture"}]
    write_samples(tmp_path, [make(1, messages=answer, images=[])])


def test_repeated_id_and_used_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSample, match="share the id 's1'"):
        write_samples(tmp_path / "a", [make(1), make(2), make(1)])
    with pytest.raises(BadSample, match="empty id"):
        write_samples(tmp_path / "b", [make(1, id="")])
    write_samples(tmp_path / "c", [make(1)])
    with pytest.raises(ValueError, match="already holds a dataset"):
        write_samples(tmp_path / "c", [make(1)])
    (tmp_path / "d").mkdir()
    with pytest.raises(ValueError, match=r"holds no index\.json"):
        next(read_samples(tmp_path / "d"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])), inner
    ),
    max_leaves=8,
)  # fmt: skip


@hypothesis_settings(
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    meta=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), json_values),
    text=st.text(st.characters(exclude_categories=["Cs"])),
    image=st.binary(max_size=64),
)
def test_any_text_meta_and_bytes_survive(
    tmp_path_factory: pytest.TempPathFactory, meta: dict[str, Any], text: str, image: bytes
) -> None:
    content = "<image>\n" + text.replace("<image>", "")
    sample = make(0, messages=[{"role": "user", "content": content}], images=[image], meta=meta)
    folder = tmp_path_factory.mktemp("dataset")
    write_samples(folder, [sample])
    assert next(read_samples(folder)) == sample
    assert SampleReader(folder)[0] == sample
