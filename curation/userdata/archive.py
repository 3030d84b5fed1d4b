"""WebDataset tars: members that share a name up to the first dot are one item.

Nothing is ever extracted to disk; members are read as a stream, each within a bound.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from curation.userdata.records import (
    IMAGE_SUFFIXES,
    MAX_IMAGE_BYTES,
    MAX_VIDEO_BYTES,
    VIDEO_SUFFIXES,
    Record,
    Refusal,
    Rejected,
)
from curation.userdata.words import decode, fill_words, json_object

TEXT_EXTENSIONS = ("txt", "caption", "text")
# Bytes a compressed archive may unfold to, at most; what lies behind is reported as not read.
MAX_TOTAL_BYTES = 64 << 30


def read_tar(path: Path, name: str) -> Iterator[Record | Rejected]:
    """Every item of a tar, in its order."""
    try:
        with tarfile.open(path, "r|*") as archive:
            yield from _items(archive, name)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        yield Rejected(name, "bad_archive", f"{type(error).__name__}: {error}")


def _items(archive: tarfile.TarFile, name: str) -> Iterator[Record | Rejected]:
    group: dict[str, bytes] = {}
    key, total = "", 0
    for member in archive:
        where = f"{name}/{member.name}"
        total += member.size
        if total > MAX_TOTAL_BYTES:
            yield Rejected(where, "too_large", f"the archive unfolds to over {MAX_TOTAL_BYTES}")
            break
        if member.isdir():
            continue
        refusal = _member_fault(member)
        if refusal is not None:
            yield Rejected(where, refusal.reason, refusal.detail)
            continue
        stem, _, extension = PurePosixPath(member.name).name.partition(".")
        own = (PurePosixPath(member.name).parent / stem).as_posix()
        if own != key and group:
            yield _record(f"{name}/{key}", group)
            group = {}
        key = own
        if sum(map(len, group.values())) + member.size > MAX_VIDEO_BYTES:
            yield Rejected(where, "too_large", f"one item of over {MAX_VIDEO_BYTES} bytes")
            continue
        file = archive.extractfile(member)
        group[extension.lower()] = file.read() if file is not None else b""
    if group:
        yield _record(f"{name}/{key}", group)


def _member_fault(member: tarfile.TarInfo) -> Refusal | None:
    parts = PurePosixPath(member.name).parts
    if member.name.startswith(("/", "\\")) or ".." in parts or "\\" in member.name:
        return Refusal("path_escape", f"{member.name[:80]!r} leads outside the archive")
    if member.issym() or member.islnk():
        return Refusal("symlink_escape", f"a link to {member.linkname[:80]!r}")
    if not member.isreg():
        return Refusal("not_a_file", "a device or pipe")
    is_video = member.name.lower().endswith(VIDEO_SUFFIXES)
    limit = MAX_VIDEO_BYTES if is_video else MAX_IMAGE_BYTES
    if member.size > limit:
        return Refusal("too_large", f"{member.size} bytes, the limit is {limit}")
    return None


def _record(name: str, group: dict[str, bytes]) -> Record | Rejected:
    """The item of one key: media by extension, words from json or text members."""
    record = Record(name)
    try:
        for extension, data in group.items():
            last = "." + extension.rpartition(".")[2]
            if last in IMAGE_SUFFIXES:
                record.images.append(data)
            elif last in VIDEO_SUFFIXES:
                record.video = data
            elif extension in TEXT_EXTENSIONS:
                record.caption = decode(data)
        if "json" in group:
            fill_words(record, json_object(group["json"]))
    except Refusal as refusal:
        return Rejected(name, refusal.reason, refusal.detail)
    return record
