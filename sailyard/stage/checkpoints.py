"""Checkpoints inside a stage: what lets a killed process go on where it was.

Layout under ``checkpoints/<cache key>/``: the files of one save in a folder of their own,
then one pointer object with their names, sizes and digests, written last. Only a pointer
makes a checkpoint exist, and every file is verified before it is used, so neither a kill in
mid-save nor a torn upload is ever loaded: the checkpoint before it is.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sailyard.stage.errors import StageError

if TYPE_CHECKING:
    from sailyard.artifacts import ObjectStore

log = logging.getLogger(__name__)


class Checkpoints:
    """Checkpoints of one cache key in an object store."""

    def __init__(
        self,
        store: ObjectStore,
        cache_key: str,
        folder: Path,
        keep: int = 2,
        before_pointer: Callable[[], None] = lambda: None,
    ) -> None:
        """Open the checkpoints of a cache key.

        Args:
            store: Where they are kept.
            cache_key: Of the stage; another configuration never sees them.
            folder: Local folder that ``latest`` downloads into.
            keep: Newest checkpoints that survive a save. Two: should the newest turn out
                damaged, one is left.
            before_pointer: Called when a save is about to count. A resumed stage starts after
                it and never reports what came before again, so that must be safe by then.
        """
        self._store = store
        self._prefix = f"checkpoints/{cache_key}/"
        self._folder = folder
        self._keep = keep
        self._before_pointer = before_pointer

    def save(self, step: int, directory: Path) -> None:
        """Keep a copy of the directory's files as the checkpoint of a step.

        The caller may change or delete the directory afterwards.

        Raises:
            StageError: The step is negative or the directory holds no file.
        """
        if step < 0:
            raise StageError(f"a checkpoint needs a step of at least 0, not {step}")
        paths = sorted(path for path in directory.rglob("*") if path.is_file())
        if not paths:
            raise StageError(f"the checkpoint of step {step} is empty: {directory} holds no file")
        data = f"{self._prefix}{step:012d}-{secrets.token_hex(6)}/"
        files = []
        for path in paths:
            name = path.relative_to(directory).as_posix()
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self._store.put(data + name, path, sha256=digest)
            files.append({"name": name, "sha256": digest})
        self._before_pointer()
        self._store.write_json(
            self._pointer_key(step), {"step": step, "data": data, "files": files}
        )
        self._prune()

    @cached_property
    def resume_point(self) -> tuple[int, Path] | None:
        """The checkpoint that this process goes on from, as ``latest`` gave it when first asked.

        Parts of a stage that each looked for themselves could see different ones, should the
        store fail in between: one part would count as done whose weights the next never loaded.
        """
        return self.latest()

    def latest(self) -> tuple[int, Path] | None:
        """The newest checkpoint that is whole: its step and a local copy, or None."""
        for step in reversed(self._steps()):
            target = self._folder / f"{step:012d}"
            try:
                self._download(step, target)
            except (StageError, OSError, KeyError, ValueError) as error:
                log.warning("checkpoint of step %d is not usable: %s", step, error)
                continue
            return step, target
        return None

    def exist(self) -> bool:
        """Whether there is any checkpoint to go on from."""
        return bool(self._steps())

    def clear(self) -> None:
        """Remove every checkpoint of the cache key: its stage has finished."""
        # Pointers first: a half-cleared checkpoint must not look whole.
        keys = sorted(self._store.list(self._prefix), key=lambda key: not key.endswith(".json"))
        for key in keys:
            self._store.delete(key)

    def _pointer_key(self, step: int) -> str:
        return f"{self._prefix}{step:012d}.json"

    def _steps(self) -> list[int]:
        """Steps that have a pointer, ascending."""
        names = [key.removeprefix(self._prefix) for key in self._store.list(self._prefix)]
        pointers = [name for name in names if "/" not in name and name.endswith(".json")]
        return sorted(int(name.removesuffix(".json")) for name in pointers)

    def _read_pointer(self, step: int) -> dict[str, Any]:
        pointer: dict[str, Any] = self._store.read_json(self._pointer_key(step))
        return pointer

    def _download(self, step: int, target: Path) -> None:
        pointer = self._read_pointer(step)
        shutil.rmtree(target, ignore_errors=True)
        for entry in pointer["files"]:
            path = (target / entry["name"]).resolve()
            if not path.is_relative_to(target.resolve()):
                raise StageError(f"file name {entry['name']!r} leads out of the checkpoint")
            path.parent.mkdir(parents=True, exist_ok=True)
            found = self._store.download(pointer["data"] + entry["name"], path)
            if found != entry["sha256"]:
                raise StageError(f"file {entry['name']!r} differs from what was saved")

    def _prune(self) -> None:
        steps = self._steps()
        for step in steps[: -self._keep]:
            self._store.delete(self._pointer_key(step))
        kept = {self._read_pointer(step)["data"] for step in steps[-self._keep :]}
        # Whatever no pointer names is an older save or the remains of a killed one.
        for key in self._store.list(self._prefix):
            inside = key.removeprefix(self._prefix)
            folder, slash, _ = inside.partition("/")
            if slash and f"{self._prefix}{folder}/" not in kept:
                self._store.delete(key)
