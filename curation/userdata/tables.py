"""Parquet files and the Arrow files of Hugging Face data sets saved to disk, read with pyarrow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation.userdata.records import Record, Refusal, Rejected
from curation.userdata.words import MEDIA_FIELDS, fill_words, record_id

# Rows in memory at once: images may be large.
BATCH_ROWS = 16
# (folder of the table, reference) -> a record with that medium
Lookup = Callable[[Path, str], Record]


def read_parquet(path: Path, name: str, lookup: Lookup) -> Iterator[Record | Rejected]:
    """Every row of a Parquet file."""
    try:
        with pq.ParquetFile(path) as file:
            yield from _rows(file.iter_batches(batch_size=BATCH_ROWS), path, name, lookup)
    except (pa.ArrowException, OSError) as error:
        yield Rejected(name, "bad_table", f"{type(error).__name__}: {error}")


def read_arrow(path: Path, name: str, lookup: Lookup) -> Iterator[Record | Rejected]:
    """Every row of an Arrow file in either of its two formats."""
    try:
        with pa.memory_map(str(path)) as source:
            try:
                reader: Any = pa.ipc.open_stream(source)
            except pa.ArrowInvalid:
                source.seek(0)
                file = pa.ipc.open_file(source)
                reader = (file.get_batch(i) for i in range(file.num_record_batches))
            yield from _rows(reader, path, name, lookup)
    except (pa.ArrowException, OSError) as error:
        yield Rejected(name, "bad_table", f"{type(error).__name__}: {error}")


def _rows(
    batches: Iterator[pa.RecordBatch], path: Path, name: str, lookup: Lookup
) -> Iterator[Record | Rejected]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            piece = batch.slice(start, BATCH_ROWS)
            for index in range(piece.num_rows):
                where = f"{name}:{number}"
                number += 1
                try:
                    yield _record(_row(piece, index), where, path, lookup)
                except Refusal as refusal:
                    yield Rejected(where, refusal.reason, refusal.detail)
    if number == 0:
        yield Rejected(name, "empty", "the table holds no row")


def _row(batch: pa.RecordBatch, index: int) -> dict[str, Any]:
    """One row as Python values; text that is not UTF-8 is refused, not raised."""
    out = {}
    for column in batch.schema.names:
        try:
            out[column] = batch.column(column)[index].as_py()
        except UnicodeDecodeError as error:
            raise Refusal("caption_encoding", f"column {column!r} is not UTF-8") from error
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise Refusal("bad_record", f"column {column!r}: {error}") from error
    return out


def _record(row: Mapping[str, Any], where: str, path: Path, lookup: Lookup) -> Record:
    record = Record(record_id(row, where))
    # Plain rows of this yard's own data sets carry their images as a list of bytes.
    for name in MEDIA_FIELDS:
        if row.get(name) is not None:
            values = row[name] if isinstance(row[name], list) else [row[name]]
            is_video = name in ("video", "mp4", "video_path")
            for value in values:
                _add_medium(record, value, path, lookup, is_video)
            break
    fill_words(record, row)
    return record


def _add_medium(record: Record, value: Any, path: Path, lookup: Lookup, is_video: bool) -> None:
    if isinstance(value, Mapping):  # Hugging Face's Image and Video: {"bytes": ..., "path": ...}
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        if is_video:
            record.video = value
        else:
            record.images.append(value)
    elif isinstance(value, str):
        found = lookup(path.parent, value)
        record.images += found.images
        record.video = found.video if found.video is not None else record.video
    else:
        raise Refusal("image_missing", "the row's image is neither bytes nor a path")
