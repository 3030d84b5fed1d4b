"""What an object store does, and the errors that every kind of store raises."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

CHUNK_BYTES = 1 << 20
"""Bytes read or written at once; no file is ever held in memory whole."""

_STALE_SECONDS = 24 * 3600

# EFBIG: a quota of the file size kind; for the caller it is the same trouble.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StoreError(OSError):
    """The store could not do what was asked; the message names the key and the way out."""


class ObjectNotFound(StoreError):
    """No object has this key."""


class StoreUnavailable(StoreError):
    """The store cannot be reached, or kept failing until the retries were used up."""


class ContentChanged(StoreError):
    """A file is not, or no longer, what its caller said it is; nothing was written."""


class StoreFull(StoreError):
    """No space is left; nothing became visible."""


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces, UTF-8: equal values give equal bytes."""
    text = json.dumps(
        value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    return text.encode()


def check_key(key: str) -> str:
    """Return the key if it is a plain relative path; StoreError otherwise.

    Keys become file names, so ``..``, absolute paths and empty parts are refused everywhere.
    """
    parts = key.split("/")
    bad = (
        any(part in ("", ".", "..") for part in parts)
        or "\\" in key
        or "\0" in key
        or PurePosixPath(key).is_absolute()
    )
    if bad:
        raise StoreError(f"{key!r} is not a usable key: write relative parts joined by /")
    return key


@contextmanager
def space_errors(place: Path, doing: str) -> Iterator[None]:
    """Turn a full disk into StoreFull, naming the place and what was being done."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StoreFull(
                f"no space left in {place} while {doing}; nothing was published: free some space "
                "or point SAILYARD_HOME or SAILYARD_STORE elsewhere, then run again"
            ) from error
        raise


class ObjectStore(ABC):
    """Named blobs. Every write is all or nothing: a reader sees the old bytes or the new."""

    @abstractmethod
    def put(
        self, key: str, data: bytes | Path, if_absent: bool = False, sha256: str | None = None
    ) -> bool:
        """Store bytes or a file's content under a key.

        Args:
            key: Relative path, parts joined by "/".
            data: The bytes, or the file to stream.
            if_absent: Write only if no object has this key; decided by the store itself, so
                of many writers exactly one wins.
            sha256: What the bytes must hash to, in hex; checked while they are streamed and
                before they become visible.

        Returns:
            Whether this call wrote the object: False only with if_absent.

        Raises:
            ContentChanged: The bytes do not have the given sha256.
            StoreFull, StoreUnavailable: Nothing was written.
        """

    @abstractmethod
    def get(self, key: str) -> bytes:
        """The object's bytes; ObjectNotFound if there is none."""

    @abstractmethod
    def download(self, key: str, path: Path) -> str:
        """Stream the object into a file of the caller's own; return its sha256 in hex."""

    def link_or_download(self, key: str, path: Path) -> str:
        """Like `download`, but the file may share storage with the store: never write to it."""
        return self.download(key, path)

    def local_path(self, key: str) -> Path | None:
        """Where the object would lie as a file of this machine, to be read in place; None if
        objects lie elsewhere."""
        return None

    @abstractmethod
    def size(self, key: str) -> int | None:
        """The object's size in bytes, or None if there is none."""

    def exists(self, key: str) -> bool:
        """Whether an object has this key."""
        return self.size(key) is not None

    @abstractmethod
    def list(self, prefix: str = "") -> list[str]:
        """Keys that begin with the prefix, sorted."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; no error if there is none."""

    def read_json(self, key: str) -> Any:
        """The object parsed as JSON; StoreError if it is not JSON."""
        try:
            return json.loads(self.get(key))
        except ValueError as error:
            raise StoreError(f"object {key} is not JSON: {error}") from error

    def write_json(self, key: str, value: Any, if_absent: bool = False) -> bool:
        """Store a value as canonical JSON; see `put`."""
        return self.put(key, canonical_json(value), if_absent=if_absent)


class CheckedReader(io.RawIOBase):
    """A file read once from start to end, hashed on the way.

    The read that reaches the expected size raises ContentChanged if the bytes do not have the
    expected sha256, so whoever streams them never gets to the step that makes them visible.
    """

    def __init__(self, source: IO[bytes], size: int, sha256: str | None, name: str) -> None:
        self._source, self._left, self._expected = source, size, sha256
        self._digest, self._name = hashlib.sha256(), name
        if size == 0:
            self._check()

    def readable(self) -> bool:
        """Always."""
        return True

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes; ContentChanged at the last if they are not the expected ones."""
        wanted = self._left if size < 0 else min(size, self._left)
        chunk = self._source.read(wanted)
        self._left -= len(chunk)
        if wanted and not chunk:
            raise ContentChanged(f"{self._name} became shorter while it was read")
        if self._expected is not None and chunk:
            self._digest.update(chunk)
            if self._left == 0:
                self._check()
        return chunk

    def _check(self) -> None:
        if self._expected is not None and self._digest.hexdigest() != self._expected:
            raise ContentChanged(f"{self._name} changed while it was being stored")


@contextmanager
def open_checked(data: bytes | Path, sha256: str | None, key: str) -> Iterator[CheckedReader]:
    """Read bytes or a file for `put`, checked against the sha256 if there is one."""
    size = object_size(data)
    if isinstance(data, Path):
        with data.open("rb") as source:
            yield CheckedReader(source, size, sha256, str(data))
    else:
        yield CheckedReader(io.BytesIO(data), size, sha256, key)


def remove_stale(folder: Path, pattern: str) -> None:
    """Remove what killed processes left half written; a day is longer than any single write."""
    oldest = time.time() - _STALE_SECONDS
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime >= oldest:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def object_size(data: bytes | Path) -> int:
    """Bytes that `put` would write."""
    return data.stat().st_size if isinstance(data, Path) else len(data)
