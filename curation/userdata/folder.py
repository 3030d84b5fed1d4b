"""Folders: media with captions in JSON Lines, CSV or sidecar files, and all else in them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from curation.userdata.archive import read_tar
from curation.userdata.records import (
    IMAGE_SUFFIXES,
    MAX_IMAGE_BYTES,
    MAX_VIDEO_BYTES,
    VIDEO_SUFFIXES,
    Record,
    Refusal,
    Rejected,
)
from curation.userdata.tables import read_arrow, read_parquet
from curation.userdata.words import (
    MEDIA_FIELDS,
    csv_rows,
    fill_words,
    json_lines,
    read_sidecar,
    record_id,
)

Found = Iterator[Record | Rejected]
SIDECAR_SUFFIXES = (".txt", ".caption", ".json")
# Files that describe a data set and are no items of it.
DESCRIPTIONS = (
    "dataset_info.json", "dataset_dict.json", "state.json", "index.json", "readme.md",
    "license", "license.txt", ".gitattributes", ".ds_store", "thumbs.db",
)  # fmt: skip


class Folder:
    """A folder (or one file) and the rules for what may be read below it."""

    def __init__(self, path: Path) -> None:
        self.root = (path if path.is_dir() else path.parent).resolve()
        self.path = path
        # Media that a JSON Lines or CSV file speaks of are not looked at a second time.
        self._claimed: set[str] = set()

    def name(self, path: Path) -> str:
        """Where an item is, relative to the folder, in one spelling on every system."""
        try:
            return path.relative_to(self.root).as_posix()
        except ValueError:
            return path.name

    def read_file(self, path: Path, limit: int) -> bytes:
        """A regular file's bytes.

        Raises:
            Refusal: it lies outside the folder, is no regular file, or is too large.
        """
        try:
            real = path.resolve(strict=True)
            status = real.stat()
        except (OSError, RuntimeError) as error:
            raise Refusal("image_missing", f"{path.name}: {error}") from error
        if not real.is_relative_to(self.root):
            reason = "symlink_escape" if path.is_symlink() else "path_escape"
            raise Refusal(reason, f"{path.name} leads outside the folder")
        if not stat.S_ISREG(status.st_mode):
            raise Refusal("not_a_file", f"{path.name} is not a regular file")
        if status.st_size > limit:
            raise Refusal("too_large", f"{status.st_size} bytes, the limit is {limit}")
        return real.read_bytes()

    def scan(self) -> Found:
        """Every item of the folder, tables of captions first, each in the order of names."""
        paths = sorted(self._walk()) if self.path.is_dir() else [self.path]
        for path in paths:
            if path.suffix.lower() in (".jsonl", ".csv", ".tsv") and self._plain(path):
                yield from self._listed(path)
        sidecars = {p for p in paths if p.suffix.lower() in SIDECAR_SUFFIXES}
        media = [p for p in paths if p.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES]
        used = {s for p in media for s in self._sidecars(p)}
        for path in paths:
            if os.path.realpath(path) in self._claimed or path in used:
                continue
            yield from self._one(path, path in sidecars)

    def _walk(self) -> Iterator[Path]:
        for directory, names, files in os.walk(self.path, followlinks=False):
            names.sort()
            # A linked directory is not entered: its target is walked where it really lies, or is
            # outside the folder, and then the link is reported like a file.
            links = [n for n in names if (Path(directory) / n).is_symlink()]
            for name in [*files, *links]:
                yield Path(directory) / name

    def _plain(self, path: Path) -> bool:
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError):
            return False
        return real.is_file() and real.is_relative_to(self.root)

    def _one(self, path: Path, is_sidecar: bool) -> Found:
        suffix, name = path.suffix.lower(), self.name(path)
        if suffix in (".jsonl", ".csv", ".tsv") and self._plain(path):
            return  # read already
        if path.name.lower() in DESCRIPTIONS:
            return
        if not self._plain(path):
            yield self._not_plain(path)
        elif suffix in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
            yield self._with_sidecar(path)
        elif suffix == ".tar" or path.name.lower().endswith((".tar.gz", ".tgz")):
            yield from read_tar(path, name)
        elif suffix == ".parquet":
            yield from read_parquet(path, name, self.media_at)
        elif suffix == ".arrow":
            yield from read_arrow(path, name, self.media_at)
        elif is_sidecar:
            yield Rejected(name, "image_missing", "a caption without an image of the same name")
        else:
            yield Rejected(name, "unrecognised", f"no reader for {suffix or 'this'} files")

    def _not_plain(self, path: Path) -> Rejected:
        try:
            self.read_file(path, MAX_IMAGE_BYTES)
        except Refusal as refusal:
            return Rejected(self.name(path), refusal.reason, refusal.detail)
        return Rejected(self.name(path), "not_a_file", "not a regular file")

    def _sidecars(self, path: Path) -> list[Path]:
        """Caption files that belong to a medium: name.txt, or name.jpg.txt."""
        stems = (path.with_suffix(""), path)
        named = [Path(f"{stem}{suffix}") for stem in stems for suffix in SIDECAR_SUFFIXES]
        return [p for p in named if p.is_file()]

    def _with_sidecar(self, path: Path) -> Record | Rejected:
        name = self.name(path)
        try:
            record = self.load(path, name)
            sidecars = self._sidecars(path)
            if sidecars:
                data = self.read_file(sidecars[0], MAX_IMAGE_BYTES)
                read_sidecar(data, sidecars[0].suffix.lower(), record)
        except Refusal as refusal:
            return Rejected(name, refusal.reason, refusal.detail)
        return record

    def load(self, path: Path, name: str) -> Record:
        """A record with the medium of a file.

        Raises:
            Refusal: see `read_file`.
        """
        if path.suffix.lower() in VIDEO_SUFFIXES:
            return Record(name, video=self.read_file(path, MAX_VIDEO_BYTES))
        return Record(name, images=[self.read_file(path, MAX_IMAGE_BYTES)])

    def media_at(self, base: Path, reference: str) -> Record:
        """The medium that a table names by a path relative to itself.

        Raises:
            Refusal: an address on the net, a path out of the folder, or no such file.
        """
        if "://" in reference:
            raise Refusal("remote_media", f"{reference[:80]!r} is an address; fetch it first")
        if "\x00" in reference or len(reference) > 4096:
            raise Refusal("bad_record", "not a file name")
        path = base / reference
        normal = Path(os.path.normpath(path.absolute()))
        if not normal.is_relative_to(self.root):
            raise Refusal("path_escape", f"{reference[:80]!r} leads outside the folder")
        record = self.load(path, self.name(normal))
        self._claimed.add(os.path.realpath(path))
        return record

    def _listed(self, path: Path) -> Found:
        """Items that a JSON Lines or CSV file names."""
        rows = json_lines(path) if path.suffix.lower() == ".jsonl" else csv_rows(path)
        any_row = False
        for number, row in rows:
            any_row = True
            where = f"{self.name(path)}:{number}"
            try:
                if isinstance(row, Refusal):
                    raise row
                yield self._row(path.parent, row, where)
            except Refusal as refusal:
                yield Rejected(where, refusal.reason, refusal.detail)
        if not any_row:
            yield Rejected(self.name(path), "empty", "the file holds no row")

    def _row(self, base: Path, row: Mapping[str, Any], where: str) -> Record:
        references = _references(row)
        if not references:
            names = ", ".join(MEDIA_FIELDS[:6])
            raise Refusal("image_missing", f"the row names no medium; use one of {names}, ...")
        record = self.media_at(base, references[0])
        for reference in references[1:]:
            record.images += self.media_at(base, reference).images
        record.name = record_id(row, record.name)
        fill_words(record, row)
        return record


def _references(row: Mapping[str, Any]) -> list[str]:
    for name in MEDIA_FIELDS:
        value = row.get(name)
        if isinstance(value, str) and value:
            return [value]
        if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
            return list(value)
    return []
