"""Training state in files: safetensors for tensors, JSON for everything else, never pickle.

Every rank writes the tensors that it owns, under the model's own names, so that a run goes on with
any number of ranks and under any way of sharing.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sailyard.stage import Rank

STATE_FILE = "state.json"
SHARDS = "tensors-*.safetensors"


def shard_file(rank: Rank) -> str:
    """Name of a rank's tensors."""
    return f"tensors-{rank.number:05d}-of-{rank.size:05d}.safetensors"


def write_state(
    directory: Path, rank: Rank, tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any]
) -> None:
    """Write one rank's tensors, and on rank 0 the JSON-able rest, to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), str(directory / shard_file(rank)))
    if rank.number == 0:
        (directory / STATE_FILE).write_text(json.dumps(scalars), encoding="utf-8")


def read_scalars(directory: Path) -> dict[str, Any]:
    """The JSON-able part of a checkpoint."""
    scalars: dict[str, Any] = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
    return scalars


def read_tensors(directory: Path, rank: Rank) -> dict[str, torch.Tensor]:
    """The shards that fall to this rank, of however many ranks have written; together all ranks
    read every shard once."""
    shards = sorted(directory.glob(SHARDS))[rank.number :: rank.size]
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        with safe_open(str(shard), framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


class BackgroundSaver:
    """Saves one state at a time while training goes on."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, directory: Path, save: Callable[[], None]) -> None:
        """Run `save` beside the training, and remove `directory` after it.

        Waits for the save before, and raises what it raised.
        """
        self.wait()

        def work() -> None:
            try:
                save()
            except BaseException as error:  # handed to whoever waits
                self._error = error
            finally:
                shutil.rmtree(directory, ignore_errors=True)

        # A daemon: whoever wants the save to be whole waits for it, and nobody else should.
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is under way; raises what the last save raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
