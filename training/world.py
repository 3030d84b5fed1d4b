"""The ranks that train together, and the few things they tell each other beside gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from model.device import own_device
from sailyard.stage import Rank

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for another in one exchange before it gives up."""


@dataclass(frozen=True, slots=True)
class World:
    """One rank's view of all. Exchanges must be called by every rank, in the same order.

    Attributes:
        rank: Which this is.
        device: Where its share of the model lives.
    """

    rank: Rank
    device: torch.device

    @property
    def size(self) -> int:
        """Ranks."""
        return self.rank.size

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's equal share of what a step deals out, in the order of ranks.

        Raises:
            ValueError: It does not divide.
        """
        share, rest = divmod(len(items), self.size)
        if rest:
            raise ValueError(
                f"{len(items)} rows do not divide over {self.size} ranks: make batch_size a "
                "multiple of the number of ranks"
            )
        return items[self.rank.number * share : (self.rank.number + 1) * share]

    def share(self, count: int) -> slice:
        """This rank's part of `count` things in the order of ranks, as even as they divide."""
        return slice(
            count * self.rank.number // self.size, count * (self.rank.number + 1) // self.size
        )

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over ranks, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        summed: list[float] = total.tolist()
        return summed

    def any(self, flag: bool) -> bool:
        """Whether it holds on some rank."""
        return flag if self.size == 1 else self.sum([float(flag)])[0] > 0

    def from_first(self, value: T) -> T:
        """Rank 0's value."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        first: T = box[0]
        return first

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def join_world() -> World:
    """Meet the other ranks of this stage, as torchrun's variables tell; alone without them."""
    rank = Rank.from_environment()
    device = own_device(rank.local)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    if rank.size > 1 and not dist.is_initialized():
        # Tensors on a GPU go by NCCL, everything else by gloo.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    return World(rank, device)
