"""The one record every dataset of the yard is made of, and its Parquet shards.

A dataset artifact is a directory of ``part-00000.parquet``, ``part-00001.parquet``, ... in
the schema below. Rows are written in the order they are given and with fixed writer options,
so equal samples give equal bytes, hence equal artifact digests.
"""

from __future__ import annotations

import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

IMAGE_PLACEHOLDER = "<image>"
"""Stands for one image (or one video frame) in a user turn; followed by a newline."""

SKILLS = (
    "count",
    "existence",
    "colour",
    "shape",
    "relation",
    "word",
    "digit",
    "sum",
    "box",
    "chart",
    "motion",
    "photo",
)
"""What a question of the small world can ask for; the evaluation reports each by name."""

ROLES = ("system", "user", "assistant")

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("messages", pa.string(), nullable=False),
        pa.field("images", pa.list_(pa.binary()), nullable=False),
        pa.field("is_video", pa.bool_(), nullable=False),
        pa.field("meta", pa.string(), nullable=False),
    ]
)
"""One row per sample; ``messages`` and ``meta`` are JSON text."""

# Random access reads whole row groups, so they are small; images are compressed already and
# only the text columns gain from zstd.
ROWS_PER_GROUP = 64


COMPOUNDS_FILE = "compounds.json"
"""Beside a text dataset: words that stand for several others, each with those (JSON object)."""


class BadSample(ValueError):
    """A sample that breaks the schema's promises; the message names it and says why."""


@dataclass(slots=True)
class Sample:
    """One conversation with its images and its ground truth.

    Attributes:
        id: Unique inside a dataset.
        source: Where it comes from: "microworld", "digits", "user:<name>", ...
        task: "caption", "text", "mixed" (several questions) or a member of SKILLS.
        messages: ``{"role": "system" | "user" | "assistant", "content": str}`` in order. A
            user turn holds one ``<image>`` placeholder for each image.
        images: Encoded PNG or JPEG files in the order of the placeholders.
        is_video: The images are frames of one clip and take one tile each.
        meta: JSON-able ground truth and bookkeeping ("answer", "check", "skill", ...).
    """

    id: str
    source: str
    task: str
    messages: list[dict[str, str]]
    images: list[bytes] = field(default_factory=list)
    is_video: bool = False
    meta: dict[str, Any] = field(default_factory=dict)


def check_sample(sample: Sample) -> None:
    """Raise BadSample unless roles are known and each placeholder has its image."""
    if not sample.id:
        raise BadSample(f"a sample of source {sample.source!r} has an empty id")
    for message in sample.messages:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise BadSample(
                f"sample {sample.id!r}: a message needs a role of {', '.join(ROLES)} and text "
                f"content, got {message!r}"
            )
    placeholders = sum(
        message["content"].count(IMAGE_PLACEHOLDER)
        for message in sample.messages
        if message["role"] == "user"
    )
    if placeholders != len(sample.images):
        raise BadSample(
            f"sample {sample.id!r} has {placeholders} {IMAGE_PLACEHOLDER} placeholders in its "
            f"user turns and {len(sample.images)} images; write one placeholder per image"
        )


def _to_row(sample: Sample) -> dict[str, Any]:
    check_sample(sample)
    try:
        # Sorted keys: two equal dicts give the same bytes whatever order they were filled in.
        meta = json.dumps(
            sample.meta, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise BadSample(f"sample {sample.id!r}: meta is not JSON: {error}") from error
    return {
        "id": sample.id,
        "source": sample.source,
        "task": sample.task,
        "messages": json.dumps(sample.messages, ensure_ascii=False, separators=(",", ":")),
        "images": sample.images,
        "is_video": sample.is_video,
        "meta": meta,
    }


def _from_row(row: dict[str, Any]) -> Sample:
    return Sample(
        id=row["id"],
        source=row["source"],
        task=row["task"],
        messages=json.loads(row["messages"]),
        images=list(row["images"]),
        is_video=row["is_video"],
        meta=json.loads(row["meta"]),
    )


def shards(directory: Path) -> list[Path]:
    """The dataset's Parquet files in order.

    Raises:
        ValueError: The directory holds no ``part-*.parquet``.
    """
    paths = sorted(Path(directory).glob("part-*.parquet"))
    if not paths:
        raise ValueError(f"{directory} is not a dataset: it holds no part-*.parquet file")
    return paths


def write_samples(directory: Path, samples: Iterable[Sample], shard_size: int = 2000) -> int:
    """Write samples to Parquet shards of ``shard_size`` rows, streaming; return their count.

    No sample at all still gives one empty shard, so an empty dataset is a dataset.

    Raises:
        BadSample: A sample breaks the schema or repeats an id.
        ValueError: The directory already holds shards.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.glob("part-*.parquet")):
        raise ValueError(f"{directory} already holds a dataset; write to an empty directory")
    seen: set[str] = set()

    def rows() -> Iterator[dict[str, Any]]:
        for sample in samples:
            if sample.id in seen:
                raise BadSample(f"two samples share the id {sample.id!r}; ids must be unique")
            seen.add(sample.id)
            yield _to_row(sample)

    stream = rows()
    shard = 0
    row = next(stream, None)
    while row is not None or shard == 0:
        with pq.ParquetWriter(
            directory / f"part-{shard:05d}.parquet", SCHEMA, compression="zstd"
        ) as writer:
            group: list[dict[str, Any]] = []
            in_shard = 0
            while row is not None and in_shard < shard_size:
                group.append(row)
                in_shard += 1
                if len(group) == ROWS_PER_GROUP:
                    writer.write_table(pa.Table.from_pylist(group, schema=SCHEMA))
                    group = []
                row = next(stream, None)
            if group:
                writer.write_table(pa.Table.from_pylist(group, schema=SCHEMA))
        shard += 1
    return len(seen)


def read_samples(directory: Path) -> Iterator[Sample]:
    """Yield the dataset's samples in written order, one row group in memory at a time."""
    for path in shards(directory):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                for row in file.read_row_group(group).to_pylist():
                    yield _from_row(row)


def count_samples(directory: Path) -> int:
    """Number of samples, from the shards' footers alone."""
    return sum(pq.read_metadata(path).num_rows for path in shards(directory))


def read_table(directory: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The dataset as one table; name ``columns`` to leave the images on disk."""
    wanted = list(columns) if columns is not None else None
    return pa.concat_tables([pq.read_table(path, columns=wanted) for path in shards(directory)])


class SampleReader(Sequence[Sample]):
    """Random access to a dataset by position, with recently used row groups kept in memory.

    Args:
        directory: The dataset.
        cache_bytes: Upper bound of the row groups kept, in bytes of Arrow memory.
    """

    def __init__(self, directory: Path, cache_bytes: int = 256 << 20) -> None:
        self.directory = Path(directory)
        self.cache_bytes = cache_bytes
        self._groups: list[tuple[Path, int]] = []
        lengths: list[int] = []
        for path in shards(self.directory):
            metadata = pq.read_metadata(path)
            for group in range(metadata.num_row_groups):
                self._groups.append((path, group))
                lengths.append(metadata.row_group(group).num_rows)
        self._starts = list(accumulate(lengths, initial=0))
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[SampleReader], tuple[Path, int]]:
        return SampleReader, (self.directory, self.cache_bytes)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        """The sample at ``index`` (negative counts from the end); IndexError past the end."""
        length = len(self)
        position = index + length if index < 0 else index
        if not 0 <= position < length:
            raise IndexError(f"sample {index} of a dataset of {length}")
        group = bisect_right(self._starts, position) - 1
        table = self._read_group(group)
        row = table.slice(position - self._starts[group], 1).to_pylist()[0]
        return _from_row(row)

    def _read_group(self, group: int) -> pa.Table:
        with self._lock:
            if group in self._cache:
                self._cache.move_to_end(group)
                return self._cache[group]
        path, index = self._groups[group]
        with pq.ParquetFile(path) as file:
            table = file.read_row_group(index)
        with self._lock:
            if group not in self._cache:
                self._cache[group] = table
                self._cached_bytes += table.nbytes
            while self._cached_bytes > self.cache_bytes and len(self._cache) > 1:
                _, dropped = self._cache.popitem(last=False)
                self._cached_bytes -= dropped.nbytes
        return table
