"""What learns: a model, its optimizer, and one update out of several backward passes.

`Learner` is plain torch: one process, or several that hold a full copy each (DDP).
`ExpertParallelLearner` (`training.expert_parallel`) shares experts, `ZeroLearner` (`training.zero`)
is the same interface over DeepSpeed's ZeRO, where ranks share the state. The gradient and the
update are the same in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sailyard.recipe.training import Dtype
from training.world import World

ParamGroups = list[dict[str, Any]]
STEP = "step"


class Learner:
    """Plain torch, one full copy of weights and optimizer state per rank."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        *,
        clip_norm: float,
        dtype: Dtype = "float32",
    ) -> None:
        """Args:
        clip_norm: Largest norm of the whole gradient.
        dtype: Precision of forward passes; the weights stay in float32.
        """
        self.model, self.optimizer, self.world = model, optimizer, world
        self.clip_norm, self.dtype = clip_norm, dtype
        self._forward: nn.Module = model
        if world.size > 1:
            self._forward = DistributedDataParallel(
                model, forward_sync_buffers=False, gradient_as_bucket_view=True
            )

    def precision(self) -> AbstractContextManager[None]:
        """Autocast of the recipe's dtype; the weights stay in float32."""
        enabled = self.dtype == "bfloat16"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=enabled)

    def forward(self, last: bool, **inputs: Any) -> Any:
        """The model's output; `last` for the last forward and backward before an update."""
        if isinstance(self._forward, DistributedDataParallel):
            # DDP sums over ranks where this is set, in the backward of this very forward.
            self._forward.require_backward_grad_sync = last
        with self.precision():
            return self._forward(**inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of this rank's share of a loss that is summed over ranks."""
        (loss * self.world.size).backward()  # DDP takes the mean over ranks

    def update(self, lr: float) -> float:
        """Clip and update, and drop the gradients; returns their norm before clipping.

        Weights stay untouched when the norm is not finite. `lr` is scaled by each group's
        `lr_scale`.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = self._norm(parameters)
        if math.isfinite(norm):
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, torch.tensor(norm))
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def part_norms(self, parts: Mapping[str, nn.Module]) -> dict[str, float]:
        """Norm of each part's gradient, before `update` drops it."""
        norms = {}
        for name, part in parts.items():
            learning = [p for p in part.parameters() if p.requires_grad]
            if learning:
                norms[name] = self._norm(learning)
        return norms

    def tensors(
        self, *, frozen: bool = True, into: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """A copy on the CPU of this rank's share of all that changes in training.

        Names are those of the model's tensors, so that any number of ranks can load it again:
        `model/<name>` and `optimizer/<name>/<key>`. Every tensor is in one rank's share.

        Args:
            frozen: With the weights that do not learn.
            into: An earlier copy to write over, which is several times as fast as new memory.
        """
        old = into or {}
        found: dict[str, Tensor] = {}

        def keep(name: str, key: str, value: Tensor) -> None:
            whole = self._collected(name, value, owner(name, self.world.size))
            if self._mine(name):
                found[key] = copied(whole, old.get(key))

        for name, tensor in own_tensors(self.model, frozen).items():
            keep(name, f"model/{name}", tensor)
        for name, parameter in self.model.named_parameters():
            for entry, value in self.optimizer.state.get(parameter, {}).items():
                keep(name, f"optimizer/{name}/{entry}", value.reshape(value.shape or (1,)))
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave, all ranks at once, each with whatever share of it.

        Raises:
            ValueError: Naming the first tensor that one side lacks or that has another shape.
        """
        named = dict(self.model.named_parameters())
        places = own_tensors(self.model, frozen=True)
        fused = {id(p) for g in self.optimizer.param_groups if g.get("fused") for p in g["params"]}
        self.optimizer.state.clear()
        for key, value in exchanged(tensors, self.world):
            kind, _, name = key.partition("/")
            if kind == "model":
                mine = self._share(name, value)
                with torch.no_grad():
                    checked(places, name, mine).copy_(mine)
            else:
                name, _, entry = name.rpartition("/")
                if name not in named:
                    raise ValueError(
                        f"the model has no parameter {name!r}, which the checkpoint optimizes"
                    )
                parameter = named[name]
                # A fused optimizer counts steps where the weights are, any other on the CPU.
                there = entry != STEP or id(parameter) in fused
                mine = value.reshape(()) if entry == STEP else self._share(name, value)
                # A copy: the next step would change what the caller has.
                self.optimizer.state[parameter][entry] = mine.to(
                    parameter.device if there else "cpu", copy=True
                )

    def whole(self) -> nn.Module:
        """The model with all its weights, for rank 0 to save; on the CPU if ranks shared them."""
        return self.model

    def whole_everywhere(self) -> nn.Module:
        """`whole` on every rank, for a stage that goes on with it on all."""
        model = self.whole()
        if not self.world.from_first(model is not self.model):
            return model
        if self.world.rank.number:
            model = type(self.model)(self.model.config).float()
        for parameter in model.parameters():
            torch.distributed.broadcast(parameter.data, src=0)
        return model

    def _norm(self, parameters: Sequence[nn.Parameter]) -> float:
        """Of their gradients together; on every rank, for all parameters of the model."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        return float(nn.utils.get_total_norm(gradients))

    def _collected(self, name: str, tensor: Tensor, to: int) -> Tensor:
        """The whole tensor on rank `to`, whatever of it this rank holds; called on every rank."""
        return tensor

    def _share(self, name: str, tensor: Tensor) -> Tensor:
        """What this rank holds of a whole tensor."""
        return tensor

    def _mine(self, name: str) -> bool:
        return owner(name, self.world.size) == self.world.rank.number


def own_tensors(model: nn.Module, frozen: bool) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once; without `frozen` those that learn only."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    buffers = model.named_buffers() if frozen else ()
    for name, tensor in [*model.named_parameters(), *buffers]:
        learns = tensor.requires_grad or frozen
        if learns and not (tensor.data_ptr() in seen and tensor.numel()):
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.detach()
    return tensors


def rebuilt(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A new model like `model` with these float32 weights on the CPU; tied ones may be named once.

    Not on the GPU: what ranks share between them need not fit on one.
    """
    new = type(model)(model.config).float()
    new.load_state_dict(weights, strict=False)
    absent = [name for name, _ in new.named_parameters() if name not in weights]
    assert not absent, absent
    return new


def owner(name: str, size: int) -> int:
    """The rank that saves a tensor: spread by name, the same on every rank."""
    return sum(name.encode()) % size


def checked(places: Mapping[str, Tensor], name: str, value: Tensor) -> Tensor:
    """Where a tensor goes; ValueError when there is no such place."""
    if name not in places:
        raise ValueError(f"tensor {name!r} is missing from the model")
    if places[name].shape != value.shape:
        raise ValueError(
            f"tensor {name!r} has shape {tuple(value.shape)}, the model expects "
            f"{tuple(places[name].shape)}"
        )
    return places[name]


def exchanged(tensors: Mapping[str, Tensor], world: World) -> Iterator[tuple[str, Tensor]]:
    """All ranks' tensors on every rank, by name; each comes from the first rank that has it.

    One at a time: together they need not fit into a host's memory.
    """
    if world.size == 1:
        yield from sorted(tensors.items())
        return
    described = {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}
    sources: dict[str, tuple[int, Any]] = {}
    for rank, found in enumerate(world.gather(described)):
        for key, shape_and_type in found.items():
            sources.setdefault(key, (rank, shape_and_type))
    for key in sorted(sources):
        rank, (shape, dtype) = sources[key]
        value = tensors[key].contiguous() if key in tensors else torch.empty(shape, dtype=dtype)
        torch.distributed.broadcast(value, src=rank)
        yield key, value


def copied(tensor: Tensor, old: Tensor | None) -> Tensor:
    """A copy on the CPU, in the memory of an old one of the same shape and type."""
    if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
        return tensor.detach().to("cpu", copy=True).contiguous()
    return old.copy_(tensor.detach())
