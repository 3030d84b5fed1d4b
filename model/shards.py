"""Safetensors files of a checkpoint directory: what is in them, read and written piece by piece."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # the released 5.46 GB lie in two files
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
AGAIN = "copy or download it again"


class CheckpointError(ValueError):
    """A checkpoint that is broken, or not what the caller takes it for."""


Pieces = tuple[torch.Tensor, ...]
"""Views of a network's memory; joined along their first dimension they are one stored tensor."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as the header of its file describes it.

    Attributes:
        file: where it lies.
        dtype: the torch type, or the header's word for one that no network of ours has.
        shape: as stored.
    """

    file: Path
    dtype: torch.dtype | str
    shape: tuple[int, ...]

    @property
    def num_values(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)


def stored_shape(pieces: Pieces) -> tuple[int, ...]:
    """Shape of the tensor that the pieces are on disk."""
    return (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:])


def read_headers(directory: str | Path) -> dict[str, StoredTensor]:
    """What the files of a checkpoint hold, without reading a tensor.

    Raises:
        CheckpointError: no safetensors, a file that is missing, cut off or of another kind, or an
            index that disagrees with its files.
    """
    directory = Path(directory)
    index = directory / INDEX
    if not index.is_file():
        if not (directory / SINGLE).is_file():
            raise CheckpointError(
                f"{directory} holds neither {SINGLE} nor {INDEX}; only safetensors are read, "
                f"never pickles"
            )
        return _read_header(directory / SINGLE)
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; {AGAIN}")
    found: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{index} points outside its directory, to {name!r}")
        found |= _read_header(directory / name)
    for name, file in weight_map.items():
        if name not in found or found[name].file.name != file:
            raise CheckpointError(f"{index} says that {name} lies in {file}; it does not; {AGAIN}")
    for name in found:
        if name not in weight_map:
            raise CheckpointError(f"{found[name].file} holds {name}, which {INDEX} does not list")
    return found


def read_object(file: Path) -> dict[str, Any]:
    """A JSON file that must hold an object.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    if not file.is_file():
        raise CheckpointError(
            f"{file.parent} holds no {file.name}; is it a whole checkpoint directory?"
        )
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({error}); {AGAIN}") from None
    if not isinstance(body, dict):
        raise CheckpointError(f"{file} holds no JSON object; {AGAIN}")
    return body


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Parsed here, as the library's error for a file that was cut off names no tensor."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; copy or download it too")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if 8 + length > size:
            raise CheckpointError(
                f"{file} is cut off inside its header, or no safetensors file ({size} bytes; a "
                f"pointer of Git LFS is about 130); {AGAIN}"
            )
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        except (ValueError, AttributeError, TypeError, KeyError):
            raise CheckpointError(f"{file} is no safetensors file; {AGAIN}") from None
    found = {}
    for name, entry in entries:
        end = 8 + length + entry["data_offsets"][1]
        if end > size:
            raise CheckpointError(
                f"{file} is cut off inside {name} {entry['shape']}: expected at least {end} "
                f"bytes, found {size}; {AGAIN}"
            )
        dtype = DTYPES.get(entry["dtype"], entry["dtype"])
        found[name] = StoredTensor(file, dtype, tuple(entry["shape"]))
    return found


def check_tensors(
    expected: Mapping[str, Pieces], stored: Mapping[str, StoredTensor], dtype: torch.dtype
) -> None:
    """Compare what a network needs with what a directory holds.

    Raises:
        CheckpointError: names the first tensor that is missing, of another shape or type, or
            that the network has no place for.
    """
    way_out = "take config.json and the weights from the same checkpoint"
    for name, pieces in expected.items():
        shape = list(stored_shape(pieces))
        if name not in stored:
            raise CheckpointError(f"{name} is missing: expected {shape}, found none; {way_out}")
        found = stored[name]
        if list(found.shape) != shape:
            raise CheckpointError(f"{name}: expected {shape}, found {list(found.shape)}; {way_out}")
        if found.dtype != dtype:
            raise CheckpointError(
                f"{name} {shape}: expected {dtype}, found {found.dtype}; store all tensors in the "
                f"type that config.json names"
            )
    for name, tensor in stored.items():
        if name not in expected:
            raise CheckpointError(
                f"{name} has no place in this network: expected none, found "
                f"{list(tensor.shape)}; {way_out}"
            )


def read_tensor(stored: Mapping[str, StoredTensor], name: str) -> torch.Tensor:
    """One tensor as it is stored."""
    with safe_open(stored[name].file, framework="pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
    return tensor


@torch.no_grad()
def read_tensors(into: Mapping[str, Pieces], stored: Mapping[str, StoredTensor]) -> None:
    """Copy stored tensors into a network, one at a time."""
    files = sorted({stored[name].file for name in into})
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name, pieces in into.items():
                if stored[name].file == file:
                    parts = tensors.get_tensor(name).split([piece.shape[0] for piece in pieces])
                    for piece, part in zip(pieces, parts, strict=True):
                        piece.copy_(part)


def write_tensors(
    directory: Path, tensors: Mapping[str, Pieces], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write one file, or numbered ones with an index; at most one file's worth is copied.

    Args:
        directory: exists.
        tensors: by the name on disk, in the order they are to lie in.
        shard_bytes: most bytes of tensors in one file; a larger tensor has a file of its own.
    """
    shards = list(_shards(tensors, shard_bytes))
    sharded = len(shards) > 1
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if sharded else SINGLE
        # The join copies even a lone piece: pieces that share memory would be refused.
        copies = {name: torch.cat([piece.detach() for piece in tensors[name]]) for name in names}
        save_file(copies, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if sharded:
        total = sum(_num_bytes(pieces) for pieces in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, Pieces], shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    filled = 0
    for name, pieces in tensors.items():
        size = _num_bytes(pieces)
        if names and filled + size > shard_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


def _num_bytes(pieces: Pieces) -> int:
    return sum(piece.numel() * piece.element_size() for piece in pieces)
