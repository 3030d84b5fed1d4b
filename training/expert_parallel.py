"""Experts spread over ranks, everything else copied: less memory than a full copy each.

Ranks are in groups of `recipe.expert_parallel` neighbours (so that tokens travel inside a machine
where they can); a group holds every expert once. A rank's experts see the tokens of its whole
group, so their gradients are summed over the ranks that hold the same experts alone; all others are
DDP's. What is saved names whole tensors, as every other learner does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from model.experts_parallel import split_experts
from sailyard.recipe.training import Dtype
from training.learner import Learner, copied, own_tensors, rebuilt
from training.world import World


@dataclass(frozen=True, slots=True)
class Spread:
    """Of which parameters this rank holds a share, and with whom.

    Attributes:
        names: Of parameters whose first dimension, experts, is shared.
        group: The ranks that hold all experts together, in order of share.
        twins: The ranks that hold the same share.
    """

    names: frozenset[str]
    group: dist.ProcessGroup
    twins: dist.ProcessGroup


def spread_experts(model: nn.Module, degree: int, world: World) -> Spread:
    """Leave this rank one share of `degree` of the model's experts; on all ranks at once.

    Raises:
        ValueError: `degree` divides neither ranks nor experts, or there are no experts.
    """
    if world.size % degree:
        raise ValueError(
            f"expert_parallel {degree} does not divide the {world.size} ranks: make their number "
            "a multiple of it"
        )
    shape = (world.size // degree, degree)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("twins", "experts"))
    group = mesh.get_group("experts")
    return Spread(frozenset(split_experts(model, group)), group, mesh.get_group("twins"))


class ExpertParallelLearner(Learner):
    """A model after `spread_experts` under DDP."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        spread: Spread,
        *,
        clip_norm: float,
        dtype: Dtype = "float32",
    ) -> None:
        self.spread = spread
        self._shares = [p for name, p in model.named_parameters() if name in spread.names]
        self._ids = {id(p) for p in self._shares}
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, list(spread.names)
        )
        super().__init__(model, optimizer, world, clip_norm=clip_norm, dtype=dtype)

    def backward(self, loss: Tensor, last: bool) -> None:
        super().backward(loss, last)
        if not last:
            return
        for parameter in self._shares:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad, group=self.spread.twins)
                parameter.grad /= self.world.size  # as DDP's mean

    def whole(self) -> nn.Module:
        """As the others' `whole`; a new model on rank 0."""
        first = self.world.rank.number == 0
        weights: dict[str, Tensor] = {}
        for name, tensor in own_tensors(self.model, frozen=True).items():
            full = self._collected(name, tensor, 0)
            if first:
                weights[name] = copied(full, None)
        return rebuilt(self.model, weights) if first else self.model

    def _norm(self, parameters: Sequence[nn.Parameter]) -> float:
        shares = [p for p in parameters if id(p) in self._ids]
        dense = super()._norm([p for p in parameters if id(p) not in self._ids])
        if not shares:
            return dense
        # Over all ranks, not the group: then all have the same bits, and weights stay equal.
        (squares,) = self.world.sum([super()._norm(shares) ** 2])
        return math.sqrt(dense**2 + squares / dist.get_world_size(self.spread.twins))

    def _collected(self, name: str, tensor: Tensor, to: int) -> Tensor:
        ranks = dist.get_process_group_ranks(self.spread.group)
        if not self._is_shared(name, tensor) or to not in ranks:
            return tensor
        parts = [torch.empty_like(tensor) for _ in ranks] if self.world.rank.number == to else None
        dist.gather(tensor.contiguous(), parts, dst=to, group=self.spread.group)
        return tensor if parts is None else torch.cat(parts)

    def _share(self, name: str, tensor: Tensor) -> Tensor:
        size = dist.get_world_size(self.spread.group)
        if not self._is_shared(name, tensor) or len(tensor) % size:
            return tensor
        return tensor.chunk(size)[dist.get_rank(self.spread.group)]

    def _is_shared(self, name: str, tensor: Tensor) -> bool:
        """Whether experts are its first dimension; the optimizer's count of steps has none."""
        return name in self.spread.names and tensor.dim() == 3
