"""Training state on disk: safetensors for tensors, JSON for everything else, never pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

STATE_FILE = "state.json"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"


def save_state(
    directory: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    scalars: dict[str, Any],
) -> None:
    """Write model, optimizer and JSON-able `scalars` (step, stream position, ...) to `directory`.

    Every parameter and buffer is stored once under its own name, tied ones under the first.
    """
    directory.mkdir(parents=True, exist_ok=True)
    save_file(_unique_tensors(model), str(directory / MODEL_FILE))
    if optimizer is not None:
        save_file(_optimizer_tensors(optimizer), str(directory / OPTIMIZER_FILE))
        scalars = {**scalars, "_groups": _group_settings(optimizer)}
    (directory / STATE_FILE).write_text(json.dumps(scalars), encoding="utf-8")


def load_state(
    directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None
) -> dict[str, Any]:
    """Restore what `save_state` wrote, in place; returns the scalars.

    Raises ValueError naming the first tensor that the model or the file lacks.
    """
    stored = load_file(str(directory / MODEL_FILE))
    current = _unique_tensors(model)
    for name in sorted(stored.keys() ^ current.keys()):
        where = "the checkpoint" if name in current else "the model"
        raise ValueError(f"{directory}: tensor {name!r} is missing from {where}")
    with torch.no_grad():
        for name, tensor in current.items():
            if tensor.shape != stored[name].shape:
                raise ValueError(
                    f"{directory}: tensor {name!r} has shape {tuple(stored[name].shape)}, "
                    f"the model expects {tuple(tensor.shape)}"
                )
            tensor.copy_(stored[name])
    scalars: dict[str, Any] = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
    groups = scalars.pop("_groups", None)
    if optimizer is not None:
        _load_optimizer(optimizer, load_file(str(directory / OPTIMIZER_FILE)), groups)
    return scalars


def snapshot(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An in-memory copy of model and optimizer tensors, for AdaLRS backtracking."""
    tensors = {f"model/{k}": v.detach().clone() for k, v in _unique_tensors(model).items()}
    tensors |= {f"optimizer/{k}": v.clone() for k, v in _optimizer_tensors(optimizer).items()}
    return tensors


def restore(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, copy: dict[str, torch.Tensor]
) -> None:
    """Bring model and optimizer back to a `snapshot`."""
    with torch.no_grad():
        for name, tensor in _unique_tensors(model).items():
            tensor.copy_(copy[f"model/{name}"])
    prefix = "optimizer/"
    state = {k.removeprefix(prefix): v for k, v in copy.items() if k.startswith(prefix)}
    _load_optimizer(optimizer, state, None)


def _unique_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    seen: set[int] = set()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        tensors[name] = tensor.detach()
    return tensors


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    index = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{index}.{key}"] = value.detach() if value.dim() else value.reshape(1)
            index += 1
    return tensors


def _load_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, torch.Tensor],
    groups: list[dict[str, Any]] | None,
) -> None:
    by_index: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        number, key = name.split(".", 1)
        by_index.setdefault(int(number), {})[key] = tensor
    optimizer.state.clear()
    index = 0
    for position, group in enumerate(optimizer.param_groups):
        if groups is not None:
            group.update(groups[position])
        for parameter in group["params"]:
            if index in by_index:
                optimizer.state[parameter] = {
                    key: value.reshape(()).clone() if key == "step" else value.clone()
                    for key, value in by_index[index].items()
                }
            index += 1


def _group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [
        {"lr": group["lr"], "weight_decay": group["weight_decay"], "name": group.get("name", "")}
        for group in optimizer.param_groups
    ]
