"""Checkpoints inside a stage: what lets a killed process go on where it was.

Layout under ``checkpoints/<cache key>/``: the files of one save in a folder of their own,
then one pointer object with their names, sizes and digests, written last. Only a pointer
makes a checkpoint exist, and every file is verified before it is used, so neither a kill in
mid-save nor a torn upload is ever loaded: the checkpoint before it is.

Several ranks save one checkpoint together: each puts its own files into the save's folder and then
a list of them; rank 0 writes the pointer once it has seen every list. No process talks to another
for that, so it can be done while training goes on.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import shutil
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sailyard.stage.errors import StageError

if TYPE_CHECKING:
    from sailyard.artifacts import ObjectStore
    from sailyard.stage.ranks import Rank

PARTS_TIMEOUT_S = 1800.0
"""How long rank 0 waits for the other ranks' files of a save."""
PARTS_POLL_S = 0.1

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

    def save(
        self, step: int, directory: Path, rank: Rank | None = None, token: str | None = None
    ) -> None:
        """Keep a copy of the directory's files as the checkpoint of a step.

        The caller may change or delete the directory afterwards.

        Args:
            step: At least 0.
            directory: With this rank's files.
            rank: Which of several ranks saves; each must name its files differently.
            token: One new word of ``new_token`` for all ranks of this save.

        Raises:
            StageError: The step is negative, the directory holds no file, or another rank's
                files did not come.
        """
        if step < 0:
            raise StageError(f"a checkpoint needs a step of at least 0, not {step}")
        paths = sorted(path for path in directory.rglob("*") if path.is_file())
        if not paths:
            raise StageError(f"the checkpoint of step {step} is empty: {directory} holds no file")
        data = f"{self._prefix}{step:012d}-{token or new_token()}/"
        files = []
        for path in paths:
            name = path.relative_to(directory).as_posix()
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self._store.put(data + name, path, sha256=digest)
            files.append({"name": name, "sha256": digest})
        if rank is not None and rank.number:
            self._store.write_json(_part_key(data, rank.number), {"files": files})
            return
        for other in range(1, rank.size if rank is not None else 1):
            files += self._files_of(data, other)
        self._before_pointer()
        self._store.write_json(
            self._pointer_key(step), {"step": step, "data": data, "files": files}
        )
        self._prune()

    def _files_of(self, data: str, rank: int) -> list[dict[str, str]]:
        """What another rank has put into the folder of a save, once it has."""
        deadline = time.monotonic() + PARTS_TIMEOUT_S
        key = _part_key(data, rank)
        while key not in self._store.list(data):
            if time.monotonic() > deadline:
                raise StageError(f"rank {rank} did not save its part within {PARTS_TIMEOUT_S} s")
            time.sleep(PARTS_POLL_S)
        files: list[dict[str, str]] = self._store.read_json(key)["files"]
        return files

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


def new_token() -> str:
    """A word that tells the folder of one save from those of all others."""
    return secrets.token_hex(6)


def _part_key(data: str, rank: int) -> str:
    return f"{data}part-{rank:05d}.json"
