"""Local copies of single files of artifacts, for reading a dataset that is larger than the disk."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path


class FileCache:
    """Files by their sha256 in one folder, bounded in bytes; several processes may share it.

    The files that were opened longest ago make room for new ones. A file that any process has
    open stays, also where that takes more than the limit. Of several processes that want the same
    file one fetches it and the others wait.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes

    def open(self, sha256: str, size: int, bring: Callable[[Path], None]) -> BufferedReader:
        """The file with this digest, every byte verified in this call.

        Args:
            sha256: In hex.
            size: Bytes that it takes.
            bring: Writes the file to a path, whole or not at all, and verifies it.
        """
        path = self.folder / sha256
        with self._only_fetcher(sha256):
            handle = self._opened(path, sha256)
            while handle is None:
                self._make_room(size)
                bring(path)
                handle = self._opened(path, sha256)
        return handle

    def _opened(self, path: Path, sha256: str) -> BufferedReader | None:
        """A handle that keeps the file here while it is open; None if there is no such file."""
        with contextlib.suppress(FileNotFoundError):
            handle = path.open("rb")
            # Shared by all readers; whoever evicts asks for it alone.
            fcntl.flock(handle, fcntl.LOCK_SH)
            if is_intact(handle, sha256):
                os.utime(path)
                return handle
            handle.close()
            path.unlink()
        return None

    @contextmanager
    def _only_fetcher(self, sha256: str) -> Iterator[None]:
        # Lock files are few and stay: one that is removed may be locked by somebody still.
        locks = self.folder / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / sha256[:2]).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int) -> None:
        found = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and not path.name.startswith("."):
                    stat = path.stat()
                    found.append((stat.st_mtime_ns, path, stat.st_size))
        used = sum(bytes_ for _, _, bytes_ in found)
        for _, path, bytes_ in sorted(found):
            if used + size <= self.limit_bytes:
                return
            if _evict(path):
                used -= bytes_


def _evict(path: Path) -> bool:
    """Remove a file unless a process reads it; whether it is gone."""
    try:
        with path.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except FileNotFoundError:  # another process was faster
        return True
    except OSError:
        return False
    return True


def is_intact(handle: BufferedReader, sha256: str) -> bool:
    """Whether a file's bytes have this digest; its position is then the start again."""
    found = hashlib.file_digest(handle, "sha256").hexdigest()
    handle.seek(0)
    return found == sha256
