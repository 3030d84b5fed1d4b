"""Immutable, content-addressed artifacts on any object store.

Layout, the same everywhere:

    objects/sha256/<ab>/<hex>          the files, each stored once however often it is used
    artifacts/<digest>/manifest.json   kind, metadata, and name, size and sha256 of every file
    artifacts/<digest>/pointer.json    written last: only with it does the artifact exist

The digest is the sha256 of the manifest, so the name of an artifact fixes every byte of it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sailyard.artifacts.cache import FileCache, is_intact
from sailyard.artifacts.objects import (
    ContentChanged,
    ObjectNotFound,
    ObjectStore,
    StoreError,
    canonical_json,
    check_key,
    remove_stale,
    space_errors,
)

STREAM_BYTES = 32 << 30
"""Bytes of streamed files that are kept on this machine. Our choice."""


class ArtifactError(ValueError):
    """An artifact that cannot be published or used; the message says what to do."""


class ArtifactNotFound(ArtifactError):
    """No artifact has this digest: it was never published, or not to its end."""


class ArtifactCorrupt(ArtifactError):
    """Stored bytes are not the bytes that were published; the message names the file."""


@dataclass(frozen=True, slots=True)
class ArtifactFile:
    """One file of an artifact: its name below the artifact's root, bytes, sha256 in hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Artifact:
    """A published artifact."""

    digest: str
    kind: str
    files: tuple[ArtifactFile, ...]
    meta: dict[str, Any]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)


class ArtifactStore:
    """Publishes folders as artifacts and brings them back, verified.

    Args:
        store: Where the objects lie.
        cache_dir: Local folder for fetched artifacts; several processes may share it.
        stream_bytes: Most bytes of streamed files kept there, beside those that are being read.
    """

    def __init__(
        self, store: ObjectStore, cache_dir: Path, stream_bytes: int = STREAM_BYTES
    ) -> None:
        self.store = store
        self.cache_dir = Path(cache_dir).absolute()
        self._streamed = FileCache(self.cache_dir / "streamed", stream_bytes)
        remove_stale(self.cache_dir, ".*")
        remove_stale(self.cache_dir / "streamed", ".*.*")

    def publish(
        self, directory: Path, kind: str, meta: Mapping[str, Any] | None = None
    ) -> Artifact:
        """Store a folder's files and make them exist as one artifact.

        Publishing the same content again, also from several processes at once, gives the same
        artifact. `meta` is part of the content: put no time or host name into it.

        Raises:
            ArtifactError: The folder is missing, empty, or changes while it is read.
            StoreError: The store is full or out of reach; the artifact does not exist then.
        """
        paths = _files_below(Path(directory))
        files = []
        for name, path in paths.items():
            sha256, size = _hash_file(path)
            self._put_file(name, path, sha256, size)
            files.append(ArtifactFile(name, size, sha256))
        artifact, manifest = _describe(kind, files, dict(meta or {}))
        self.store.put(_manifest_key(artifact.digest), manifest)
        pointer = {"digest": artifact.digest, "files": len(files), "size": artifact.size}
        self.store.write_json(_pointer_key(artifact.digest), pointer, if_absent=True)
        return artifact

    def exists(self, digest: str) -> bool:
        """Whether the artifact was published to its end."""
        return self.store.exists(_pointer_key(digest))

    def get(self, digest: str) -> Artifact:
        """Describe an artifact without fetching its files.

        Raises:
            ArtifactNotFound: There is no pointer.
            ArtifactCorrupt: The manifest is gone or not the one that was published.
        """
        if not self.exists(digest):
            raise ArtifactNotFound(
                f"no artifact {digest} in the store: it was never published, or its upload was "
                "cut off; run the stage that makes it"
            )
        key = _manifest_key(digest)
        try:
            manifest = self.store.get(key)
        except ObjectNotFound as error:
            raise ArtifactCorrupt(f"artifact {digest} has lost {key}") from error
        if hashlib.sha256(manifest).hexdigest() != digest:
            raise ArtifactCorrupt(
                f"artifact {digest}: {key} is damaged; delete it and run the stage that makes "
                "the artifact again with --force"
            )
        content = json.loads(manifest)
        files = tuple(ArtifactFile(**file) for file in content["files"])
        return Artifact(digest, content["kind"], files, content["meta"])

    def fetch(self, digest: str) -> Path:
        """A local folder with the artifact's files, every byte verified in this call.

        The folder is shared: files are read-only and may be links into the store. A damaged
        local copy is fetched anew.

        Raises:
            ArtifactNotFound: There is no such artifact.
            ArtifactCorrupt: A stored file is damaged or gone; the message names it.
        """
        artifact = self.get(digest)
        folder = self.cache_dir / digest
        if folder.is_dir():
            if _is_intact(folder, artifact):
                return folder
            self._set_aside(folder)
        building = self.cache_dir / f".building-{uuid.uuid4().hex}"
        try:
            with space_errors(self.cache_dir, f"fetching artifact {digest}"):
                building.mkdir(parents=True)
                for file in artifact.files:
                    self._fetch_file(artifact, file, building / check_key(file.name))
                _rename_unless_there(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return folder

    def stream(self, digest: str) -> ArtifactStream:
        """The artifact's files one by one, each brought and verified when it is opened.

        Raises:
            ArtifactNotFound: There is no such artifact.
        """
        return ArtifactStream(self, self.get(digest))

    def open_file(self, artifact: Artifact, file: ArtifactFile) -> BinaryIO:
        """One file of an artifact to read, every byte verified in this call.

        Where the store is a folder of this machine the file is read in place; else a local copy
        stays at least as long as the file is open.

        Raises:
            ArtifactCorrupt: The stored file is damaged or gone.
        """
        path = self.store.local_path(_object_key(file.sha256))
        if path is None:
            return self._streamed.open(
                file.sha256, file.size, lambda path: self._fetch_file(artifact, file, path)
            )
        try:
            handle = path.open("rb")
        except FileNotFoundError as error:
            raise _gone(artifact, file) from error
        if not is_intact(handle, file.sha256):
            handle.close()
            raise _damaged(artifact, file)
        return handle

    def _put_file(self, name: str, path: Path, sha256: str, size: int) -> None:
        key = _object_key(sha256)
        if self.store.size(key) == size:
            return
        try:
            self.store.put(key, path, sha256=sha256)
        except ContentChanged as error:
            raise ArtifactError(
                f"{name} changed while it was being published; publish it again"
            ) from error

    def _fetch_file(self, artifact: Artifact, file: ArtifactFile, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            found = self.store.link_or_download(_object_key(file.sha256), path)
        except ObjectNotFound as error:
            raise _gone(artifact, file) from error
        if found != file.sha256:
            raise _damaged(artifact, file, found)
        if path.stat().st_mode & 0o222:
            path.chmod(0o444)

    def _set_aside(self, folder: Path) -> None:
        aside = self.cache_dir / f".damaged-{uuid.uuid4().hex}"
        try:
            folder.rename(aside)
        except FileNotFoundError:  # another process was faster
            return
        shutil.rmtree(aside, ignore_errors=True)


class ArtifactStream:
    """Opens files of one artifact by name; a dataset's ``OpenFile`` (``sailyard.samples``)."""

    def __init__(self, artifacts: ArtifactStore, artifact: Artifact) -> None:
        self._artifacts, self.artifact = artifacts, artifact
        self._files = {file.name: file for file in artifact.files}

    def __call__(self, name: str) -> BinaryIO:
        """The file to read; FileNotFoundError if the artifact has none of that name."""
        if name not in self._files:
            raise FileNotFoundError(f"{self} has no file {name}")
        return self._artifacts.open_file(self.artifact, self._files[name])

    def __str__(self) -> str:
        return f"artifact {self.artifact.digest}"


def _gone(artifact: Artifact, file: ArtifactFile) -> ArtifactCorrupt:
    return ArtifactCorrupt(
        f"artifact {artifact.digest}: the file {file.name} is gone from the store "
        f"(object {_object_key(file.sha256)}); run the stage that makes it again with --force"
    )


def _damaged(artifact: Artifact, file: ArtifactFile, found: str = "another") -> ArtifactCorrupt:
    return ArtifactCorrupt(
        f"artifact {artifact.digest}: the file {file.name} is damaged: object "
        f"{_object_key(file.sha256)} has sha256 {found}; delete the object and run the stage "
        "that makes it again with --force"
    )


def _describe(kind: str, files: list[ArtifactFile], meta: dict[str, Any]) -> tuple[Artifact, bytes]:
    try:
        manifest = canonical_json(
            {
                "kind": kind,
                "files": [
                    {"name": file.name, "size": file.size, "sha256": file.sha256} for file in files
                ],
                "meta": meta,
            }
        )
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the metadata of a {kind} artifact is not JSON: {error}") from error
    digest = hashlib.sha256(manifest).hexdigest()
    return Artifact(digest, kind, tuple(files), meta), manifest


def _object_key(sha256: str) -> str:
    return f"objects/sha256/{sha256[:2]}/{sha256}"


def _manifest_key(digest: str) -> str:
    return f"artifacts/{digest}/manifest.json"


def _pointer_key(digest: str) -> str:
    return f"artifacts/{digest}/pointer.json"


def _files_below(directory: Path) -> dict[str, Path]:
    """Relative name -> path of every file, sorted by name."""
    if not directory.is_dir():
        raise ArtifactError(f"{directory} is not a folder: nothing to publish")
    found: dict[str, Path] = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink() and path.is_dir():
            raise ArtifactError(f"{name} is a link to a folder; publish real folders only")
        if path.is_dir():
            continue
        if not path.is_file():
            raise ArtifactError(f"{name} is neither a file nor a folder; it cannot be published")
        try:
            found[check_key(name)] = path
        except StoreError as error:
            raise ArtifactError(f"{name!r} is no usable file name: {error}") from error
    if not found:
        raise ArtifactError(f"{directory} holds no file: nothing to publish")
    return found


def _hash_file(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest, file.tell()


def _is_intact(folder: Path, artifact: Artifact) -> bool:
    expected = {file.name: (file.sha256, file.size) for file in artifact.files}
    try:
        paths = _files_below(folder)
        return paths.keys() == expected.keys() and all(
            _hash_file(path) == expected[name] for name, path in paths.items()
        )
    except (ArtifactError, OSError):
        return False


def _rename_unless_there(source: Path, target: Path) -> None:
    """Rename a folder; where another process finished the same folder first, keep that one."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
