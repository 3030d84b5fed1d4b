"""Captions beside media: sidecar files, JSON Lines and CSV, and what their fields are called."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from curation.userdata.records import MAX_TEXT_CHARACTERS, Record, Refusal, normalise_messages

# Names in use for the same thing, the first that is there counts.
CAPTION_FIELDS = ("caption", "text", "txt", "description", "caption_text")
MESSAGE_FIELDS = ("messages", "conversations", "conversation")
MEDIA_FIELDS = (
    "image", "images", "file_name", "filename", "file", "path", "image_path", "img", "jpg", "png",
    "webp", "video", "mp4", "video_path",
)  # fmt: skip
ID_FIELDS = ("id", "key", "__key__", "image_id")
MAX_LINE_BYTES = 4 * MAX_TEXT_CHARACTERS + (1 << 20)
MAX_SIDECAR_BYTES = 1 << 20


def fill_words(record: Record, fields: Mapping[str, Any]) -> None:
    """Set the record's caption or messages from named fields.

    Raises:
        Refusal: a conversation that is not one.
    """
    for name in MESSAGE_FIELDS:
        if fields.get(name) is not None:
            raw = fields[name]
            record.messages = normalise_messages(_from_json(raw) if isinstance(raw, str) else raw)
            return
    if fields.get("question") is not None and fields.get("answer") is not None:
        turns = [
            {"role": "user", "content": fields["question"]},
            {"role": "assistant", "content": fields["answer"]},
        ]
        record.messages = normalise_messages(turns)
        return
    for name in CAPTION_FIELDS:
        if fields.get(name) is not None:
            record.caption = fields[name]
            return


def record_id(fields: Mapping[str, Any], fallback: str) -> str:
    """The item's own id where it has one, else `fallback`."""
    for name in ID_FIELDS:
        value = fields.get(name)
        if isinstance(value, (str, int)) and str(value):
            return str(value)
    return fallback


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refusal("bad_record", f"not JSON: {error}") from error


def decode(data: bytes) -> str:
    """Text of a file. Bytes that are not UTF-8 become lone surrogates, so each line is judged."""
    return data.decode("utf-8-sig", errors="surrogateescape")


def json_object(data: bytes) -> Mapping[str, Any]:
    """A JSON object.

    Raises:
        Refusal: anything else.
    """
    value = _from_json(decode(data))
    if not isinstance(value, Mapping):
        raise Refusal("bad_record", f"a JSON object is needed, not a {type(value).__name__}")
    return value


def read_sidecar(data: bytes, suffix: str, record: Record) -> None:
    """Fill a record from the bytes of its sidecar: plain text, or a JSON object."""
    if len(data) > MAX_SIDECAR_BYTES:
        raise Refusal("too_large", f"a sidecar of {len(data)} bytes")
    if suffix == ".json":
        fill_words(record, json_object(data))
    else:
        record.caption = decode(data)


def json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | Refusal]]:
    """(line number, object or why not) of each filled line, reading bounded pieces."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                yield number, Refusal("too_large", f"a line above {MAX_LINE_BYTES} bytes")
            elif line.strip():
                try:
                    yield number, json_object(line)
                except Refusal as refusal:
                    yield number, refusal


def csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | Refusal]]:
    """(line number, row or why not) of a CSV or TSV file with a header."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        head = file.read(4096)
        file.seek(0)
        delimiter = "\t" if path.suffix == ".tsv" or head.split("\n")[0].count("\t") else ","
        reader = csv.DictReader(_bounded(file), delimiter=delimiter)
        try:
            for row in reader:
                if None in row or None in row.values():
                    yield reader.line_num, Refusal("bad_record", "more or fewer cells than columns")
                else:
                    yield reader.line_num, row
        except csv.Error as error:
            yield reader.line_num, Refusal("bad_record", f"the rest is not CSV: {error}")


def _bounded(file: io.TextIOBase) -> Iterator[str]:
    """Lines of at most MAX_LINE_BYTES characters: longer ones are cut, and fail as CSV."""
    while line := file.readline(MAX_LINE_BYTES):
        yield line
