"""Objects as files below one folder, with the same keys as on S3."""

from __future__ import annotations

import builtins
import contextlib
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from sailyard.artifacts.objects import (
    CHUNK_BYTES,
    ObjectNotFound,
    ObjectStore,
    check_key,
    open_checked,
    remove_stale,
    space_errors,
)

_TEMPORARY = ".tmp"


class LocalStore(ObjectStore):
    """An object store in a local folder, safe under concurrent processes.

    An object is written to a temporary file, flushed to disk and renamed into place. Objects are
    read-only files.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()
        remove_stale(self.root / _TEMPORARY, "*")

    def put(
        self, key: str, data: bytes | Path, if_absent: bool = False, sha256: str | None = None
    ) -> bool:
        """See ObjectStore.put."""
        target = self._path(key)
        if if_absent and target.exists():
            return False
        with space_errors(self.root, f"writing {key}"):
            temporary = self._write_temporary(key, data, sha256)
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                if not if_absent:
                    os.replace(temporary, target)
                elif not _link(temporary, target):
                    return False
                _flush_folder(target.parent)
            finally:
                temporary.unlink(missing_ok=True)
        return True

    def get(self, key: str) -> bytes:
        """See ObjectStore.get."""
        with self._reading(key):
            return self._path(key).read_bytes()

    def download(self, key: str, path: Path) -> str:
        """See ObjectStore.download."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        digest = hashlib.sha256()
        try:
            with (
                self._reading(key),
                space_errors(path.parent, f"reading {key}"),
                self._path(key).open("rb") as source,
                partial.open("wb") as sink,
            ):
                while chunk := source.read(CHUNK_BYTES):
                    digest.update(chunk)
                    sink.write(chunk)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return digest.hexdigest()

    def link_or_download(self, key: str, path: Path) -> str:
        """See ObjectStore.link_or_download; a hard link where the file system allows one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._reading(key):
            try:
                os.link(self._path(key), path)
            except FileNotFoundError:
                raise
            except OSError:  # another file system, or one without links
                return self.download(key, path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def local_path(self, key: str) -> Path:
        """See ObjectStore.local_path."""
        return self._path(key)

    def size(self, key: str) -> int | None:
        """See ObjectStore.size."""
        path = self._path(key)
        try:
            return path.stat().st_size if path.is_file() else None
        except FileNotFoundError:
            return None

    def list(self, prefix: str = "") -> builtins.list[str]:
        """See ObjectStore.list."""
        above = prefix.rpartition("/")[0]
        folder = self._path(above) if above else self.root
        keys = []
        for base, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if name != _TEMPORARY]
            relative = Path(base).relative_to(self.root)
            keys += [(relative / name).as_posix() for name in files]
        return sorted(key for key in keys if key.startswith(prefix))

    def delete(self, key: str) -> None:
        """See ObjectStore.delete."""
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise ObjectNotFound(f"no object {key} in {self.root}") from error

    def _write_temporary(self, key: str, data: bytes | Path, sha256: str | None) -> Path:
        folder = self.root / _TEMPORARY
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / uuid.uuid4().hex
        try:
            with path.open("xb") as sink, open_checked(data, sha256, key) as source:
                shutil.copyfileobj(source, sink, CHUNK_BYTES)
                sink.flush()
                os.fsync(sink.fileno())
            path.chmod(0o444)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path


def _link(source: Path, target: Path) -> bool:
    """Give the file its name unless the name is taken; a hard link decides that atomically."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    return True


def _flush_folder(folder: Path) -> None:
    """Make the rename survive a power cut, where folders can be flushed at all."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
