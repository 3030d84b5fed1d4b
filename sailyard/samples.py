"""The one record every dataset of the yard is made of, and its Parquet shards.

A dataset artifact is a directory of ``part-00000.parquet``, ``part-00001.parquet``, ... in
the schema below, and ``index.json``, which says how many samples each of them holds. Rows are
written in the order they are given and with fixed writer options, so equal samples give equal
bytes, hence equal artifact digests. A dataset is read through a function that opens its files by
name (``OpenFile``), so it need not lie on this machine.
"""

from __future__ import annotations

import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

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
GROUP_BYTES = 4 << 20

# A shard is what a reader fetches at once, so it is bounded by bytes, too. Our choice: large enough
# for an object store, small enough that a block of four fits into memory beside a model.
ROWS_PER_SHARD = 8192
SHARD_BYTES = 64 << 20

INDEX_FILE = "index.json"
"""Beside the shards: ``{"rows": [samples of each shard]}``."""

OpenFile = Callable[[str], BinaryIO]
"""Opens a file of a dataset by its name; FileNotFoundError if the dataset has none of that name."""

OPEN_SHARDS = 8
"""Shards that a reader keeps open when it was not told what will be read."""

FETCHERS = 2
"""Threads of a reader that open shards ahead of their use."""

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


def opener(data: Path | OpenFile) -> OpenFile:
    """How files of a dataset are opened, whether it is a directory or lies elsewhere."""
    return data if callable(data) else lambda name: (data / name).open("rb")


def shard_name(number: int) -> str:
    """File name of a dataset's shard."""
    return f"part-{number:05d}.parquet"


def rows_per_shard(data: Path | OpenFile) -> list[int]:
    """Number of samples of each shard, from the index alone.

    Raises:
        ValueError: There is no index.
    """
    try:
        with opener(data)(INDEX_FILE) as file:
            rows: list[int] = json.load(file)["rows"]
    except FileNotFoundError as error:
        raise ValueError(
            f"{data} is not a dataset: it holds no {INDEX_FILE}; write it with write_samples, or "
            "run the stage that makes it again with --force"
        ) from error
    return rows


def write_samples(
    directory: Path,
    samples: Iterable[Sample],
    shard_size: int = ROWS_PER_SHARD,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write samples to Parquet shards, streaming; return their count.

    A shard ends at ``shard_size`` rows, or when its text and images reach ``shard_bytes``. No
    sample at all still gives one empty shard, so an empty dataset is a dataset.

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

    groups = _groups(rows(), shard_size, shard_bytes)
    counts: list[int] = []
    group = next(groups, None)
    while group is not None or not counts:
        path = directory / shard_name(len(counts))
        with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
            in_shard, last = 0, group is None
            while group is not None and not last:
                writer.write_table(pa.Table.from_pylist(group.rows, schema=SCHEMA))
                in_shard, last = in_shard + len(group.rows), group.ends_shard
                group = next(groups, None)
        counts.append(in_shard)
    (directory / INDEX_FILE).write_text(json.dumps({"rows": counts}) + "\n", encoding="utf-8")
    return len(seen)


@dataclass(slots=True)
class _Group:
    rows: list[dict[str, Any]]
    ends_shard: bool


def _groups(rows: Iterable[dict[str, Any]], shard_size: int, shard_bytes: int) -> Iterator[_Group]:
    """Rows in groups as they are written, each bounded in rows and bytes."""
    group: list[dict[str, Any]] = []
    group_bytes = num_rows = num_bytes = 0  # of the group, then of the shard
    for row in rows:
        size = len(row["messages"]) + len(row["meta"]) + sum(map(len, row["images"]))
        group.append(row)
        group_bytes, num_rows, num_bytes = group_bytes + size, num_rows + 1, num_bytes + size
        ends_shard = num_rows >= shard_size or num_bytes >= shard_bytes
        if ends_shard or len(group) == ROWS_PER_GROUP or group_bytes >= GROUP_BYTES:
            yield _Group(group, ends_shard)
            group, group_bytes = [], 0
        if ends_shard:
            num_rows = num_bytes = 0
    if group:
        yield _Group(group, True)


def read_samples(data: Path | OpenFile) -> Iterator[Sample]:
    """Yield the dataset's samples in written order, one row group in memory at a time."""
    for number in range(len(rows_per_shard(data))):
        with opener(data)(shard_name(number)) as handle, pq.ParquetFile(handle) as file:
            for group in range(file.num_row_groups):
                for row in file.read_row_group(group).to_pylist():
                    yield _from_row(row)


def count_samples(data: Path | OpenFile) -> int:
    """Number of samples, from the index alone."""
    return sum(rows_per_shard(data))


def read_table(data: Path | OpenFile, columns: Sequence[str] | None = None) -> pa.Table:
    """The dataset as one table; name ``columns`` to leave the images where they are."""
    wanted = list(columns) if columns is not None else None
    tables = []
    for number in range(len(rows_per_shard(data))):
        with opener(data)(shard_name(number)) as handle:
            tables.append(pq.read_table(handle, columns=wanted))
    return pa.concat_tables(tables)


class _Shard:
    """An open shard: its file and the first row of each of its row groups, and their end."""

    def __init__(self, open_file: OpenFile, number: int) -> None:
        self.handle = open_file(shard_name(number))
        try:
            self.file = pq.ParquetFile(self.handle)
            metadata = self.file.metadata
            rows = (metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
            self.starts = list(accumulate(rows, initial=0))
        except BaseException:
            self.handle.close()
            raise


class SampleReader(Sequence[Sample]):
    """Random access to a dataset by position, wherever it lies; safe for several threads.

    Recently used row groups stay in memory, and a few shards open.

    Args:
        data: The dataset.
        cache_bytes: Upper bound of the row groups kept, in bytes of Arrow memory.

    Attributes:
        rows: Samples of each shard.
    """

    def __init__(self, data: Path | OpenFile, cache_bytes: int = 256 << 20) -> None:
        self.data, self.cache_bytes = data, cache_bytes
        self.rows = rows_per_shard(data)
        self._starts = list(accumulate(self.rows, initial=0))
        self._shards: OrderedDict[int, Future[_Shard]] = OrderedDict()
        self._max_shards = OPEN_SHARDS
        self._fetchers = ThreadPoolExecutor(FETCHERS, thread_name_prefix="shards")
        self._cache: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[SampleReader], tuple[Path | OpenFile, int]]:
        return SampleReader, (self.data, self.cache_bytes)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        """The sample at ``index`` (negative counts from the end); IndexError past the end."""
        length = len(self)
        position = index + length if index < 0 else index
        if not 0 <= position < length:
            raise IndexError(f"sample {index} of a dataset of {length}")
        number = bisect_right(self._starts, position) - 1
        with self._lock:
            table, row = self._read(number, position - self._starts[number])
        return _from_row(table.slice(row, 1).to_pylist()[0])

    def prepare(self, shards: Sequence[int]) -> None:
        """Open these shards in the background, for they are read next, and close all others."""
        with self._lock:
            for number in set(self._shards).difference(shards):
                self._drop(number)
            self._max_shards = max(OPEN_SHARDS, len(shards))
            for number in shards:
                self._ask_for(number)

    def close(self) -> None:
        """Close every shard and end the threads; nothing can be read afterwards."""
        self.prepare([])
        self._fetchers.shutdown()

    def _read(self, number: int, row: int) -> tuple[pa.Table, int]:
        """The row group that holds a shard's row, and where in it."""
        shard = self._open(number)
        group = bisect_right(shard.starts, row) - 1
        key = (number, group)
        if key not in self._cache:
            self._cache[key] = table = shard.file.read_row_group(group)
            self._cached_bytes += table.nbytes
            while self._cached_bytes > self.cache_bytes and len(self._cache) > 1:
                _, dropped = self._cache.popitem(last=False)
                self._cached_bytes -= dropped.nbytes
        self._cache.move_to_end(key)
        return self._cache[key], row - shard.starts[group]

    def _open(self, number: int) -> _Shard:
        self._ask_for(number)
        self._shards.move_to_end(number)
        while len(self._shards) > self._max_shards:
            self._drop(next(iter(self._shards)))
        try:
            return self._shards[number].result()
        except OSError:
            # What failed ahead of time may work by now.
            self._drop(number)
            self._ask_for(number)
            return self._shards[number].result()

    def _ask_for(self, number: int) -> None:
        if number not in self._shards:
            make = partial(_Shard, opener(self.data), number)
            self._shards[number] = self._fetchers.submit(make)

    def _drop(self, number: int) -> None:
        opened = self._shards.pop(number)
        opened.cancel()
        opened.add_done_callback(_close)


def _close(opened: Future[_Shard]) -> None:
    if not opened.cancelled() and opened.exception() is None:
        opened.result().handle.close()
