"""The order in which samples of one dataset come: shuffled in blocks of shards, epoch after epoch.

A dataset need not be on this machine as a whole, so samples are not drawn from all over it: shards
are shuffled, and samples within a block of a few shards. Any place of the order is known without
what stood before it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

BLOCK_SHARDS = 4
"""Shards whose samples are shuffled together, up to 32,768 samples or 256 MiB. Our choice."""


@dataclass(frozen=True, slots=True)
class _Block:
    """Some shards, ascending, and of their samples all (None), the opening ones or the others."""

    number: int
    shards: list[int]
    opening: bool | None
    size: int


class BlockShuffle:
    """Maps the n-th draw from a dataset to a sample of it.

    A dataset of one block is shuffled as a whole.

    Args:
        rows: Samples of each shard.
        seed: What the order depends on, besides the epoch.
        opening: [N] bool: the samples that the first epoch begins with; None for no matter.
        prepare: Told which shards are read now and next, at every new block.
    """

    def __init__(
        self,
        rows: Sequence[int],
        seed: Sequence[int],
        opening: np.ndarray | None,
        prepare: Callable[[Sequence[int]], None],
    ) -> None:
        self._rows, self._seed, self._opening = list(rows), list(seed), opening
        self._prepare = prepare
        self._starts = list(accumulate(rows, initial=0))
        self._epoch = -1
        self._blocks: list[_Block] = []
        self._block_starts: list[int] = []
        self._block = -1
        self._order = np.zeros(0, dtype=np.int64)

    def sample_at(self, draw: int) -> int:
        """Position in the dataset of the n-th sample drawn, epochs counted through."""
        epoch, offset = divmod(draw, self._starts[-1])
        if epoch != self._epoch:
            self._epoch, self._block = epoch, -1
            self._blocks = self._blocks_of(epoch)
            self._block_starts = list(accumulate((b.size for b in self._blocks), initial=0))
        block = bisect_right(self._block_starts, offset) - 1
        if block != self._block:
            self._block = block
            self._order = self._order_of(self._blocks[block])
            near = self._blocks[block : block + 2]
            self._prepare(list(dict.fromkeys(shard for b in near for shard in b.shards)))
        return int(self._order[offset - self._block_starts[block]])

    def _blocks_of(self, epoch: int) -> list[_Block]:
        num_blocks = -(-len(self._rows) // BLOCK_SHARDS)
        shards = np.arange(len(self._rows))
        if num_blocks > 1:
            shards = np.random.default_rng([*self._seed, epoch]).permutation(shards)
        groups = [sorted(group.tolist()) for group in np.array_split(shards, num_blocks)]
        parts = (None,) if epoch or self._opening is None else (True, False)
        return [
            _Block(number, group, part, self._size(group, part))
            for part in parts
            for number, group in enumerate(groups)
        ]

    def _size(self, shards: list[int], opening: bool | None) -> int:
        if self._opening is None or opening is None:
            return sum(self._rows[shard] for shard in shards)
        return int((self._opening[self._positions(shards)] == opening).sum())

    def _positions(self, shards: list[int]) -> np.ndarray:
        return np.concatenate([np.arange(*self._starts[s : s + 2]) for s in shards])

    def _order_of(self, block: _Block) -> np.ndarray:
        # The plain key makes the order of a single block, and of the shards where there are more.
        more = [block.number + 1] if len(self._rows) > BLOCK_SHARDS else []
        rng = np.random.default_rng([*self._seed, self._epoch, *more])
        order: np.ndarray = rng.permutation(self._positions(block.shards))
        if self._opening is None or block.opening is None:
            return order
        return order[self._opening[order] == block.opening]
