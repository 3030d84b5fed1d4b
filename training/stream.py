"""The stream of packed batches: a deterministic function of the data, the seed and a small state.

Nothing is prefetched past the state: a resumed run sees exactly the samples that the
undisturbed run would have seen, in the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from model.processor import Encoded
from sailyard.plan.flops import Cost
from sailyard.samples import Sample, SampleReader, read_table
from training.balance import Balance, balanced_rows, deal_rows
from training.packing import PackingStats, fill_row

# How many samples that were too long a stage names; it counts them all.
MAX_NAMED = 100


class Samples(Protocol):
    """Random access to a dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(slots=True)
class Source:
    """One dataset of a mixture.

    `weight` is its share of the draws, relative to the other sources. `opening` [N] is true for
    the samples that the first epoch begins with.
    """

    name: str
    reader: Samples
    weight: float
    opening: np.ndarray


@dataclass(slots=True)
class StreamBatch:
    """Samples dealt to rows, not yet collated, and where each came from.

    With `n` rows over `w` ranks, the rows of rank `r` are those from `r * n / w` on.
    """

    rows: list[list[Encoded]]
    sources: list[list[int]]  # index into the stream's sources, per row and sample
    ids: list[str]


@dataclass(slots=True)
class _Pending:
    source: int
    position: int  # how many samples of the source were drawn before this one
    sample_id: str
    encoded: Encoded
    truncated: bool
    cost: Cost  # forward FLOPs; zero where rows are not balanced
    waited: int = 0  # steps it has been left in the buffer, where rows are balanced

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.encoded.input_ids)


class PackedStream:
    """Mixes sources by weight, shuffles each epoch, and packs from a look-ahead buffer.

    Draws follow smooth weighted round-robin, so any stretch of the stream holds every source
    at its weight; each epoch of a source is a fresh permutation seeded by (seed, source, epoch),
    the first one with the source's opening samples before the others.

    A sample longer than a row is cut by `truncate` where that is given and can, else left out;
    both are counted and the first hundred are named. All ranks of a run make the same stream and
    take their own rows of each batch.

    No sample starves: a row starts with the oldest one in the buffer, so none waits for more than
    `look_ahead` rows; with `balance`, those that have waited for `look_ahead` rows start the rows,
    so none waits for more than twice that.
    """

    def __init__(
        self,
        sources: list[Source],
        encode: Callable[[Sample], Encoded],
        *,
        seq_len: int,
        batch_size: int,
        look_ahead: int,
        seed: int,
        balance: Balance | None = None,
        truncate: Callable[[Encoded], Encoded | None] | None = None,
    ) -> None:
        empty = [s.name for s in sources if len(s.reader) == 0]
        if not sources or empty:
            raise ValueError(f"no samples to train on in {empty or 'any source'}")
        self.sources, self.encode = sources, encode
        self.seq_len, self.batch_size = seq_len, batch_size
        self.look_ahead, self.seed = look_ahead, seed
        self.balance, self.truncate = balance, truncate
        self.stats = PackingStats()
        self.num_too_long = 0
        self.num_truncated = 0
        self.too_long: list[str] = []
        self._positions = [0] * len(sources)
        self._credits = [0.0] * len(sources)
        self._buffer: list[_Pending] = []
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def next_batch(self) -> StreamBatch:
        """The next `batch_size` rows of `seq_len` tokens."""
        rows = self._plain_rows() if self.balance is None else self._balanced_rows(self.balance)
        self.stats.add([[p.length for p in row] for row in rows], self.seq_len)
        return StreamBatch(
            rows=[[p.encoded for p in row] for row in rows],
            sources=[[p.source for p in row] for row in rows],
            ids=[p.sample_id for row in rows for p in row],
        )

    def _plain_rows(self) -> list[list[_Pending]]:
        rows = []
        for _ in range(self.batch_size):
            self._top_up()
            rows.append(self._take(fill_row([p.length for p in self._buffer], self.seq_len)))
        return rows

    def _balanced_rows(self, balance: Balance) -> list[list[_Pending]]:
        self._top_up()
        # No row may stay empty, so the buffer holds what two steps need at least.
        while sum(p.length for p in self._buffer) < 2 * self.batch_size * self.seq_len:
            self._draw()
        max_wait = max(self.look_ahead // self.batch_size, 1)
        costs = [p.cost for p in self._buffer]
        plan = balanced_rows(
            [p.length for p in self._buffer],
            costs,
            [p.waited >= max_wait for p in self._buffer],
            seq_len=self.seq_len,
            num_rows=self.batch_size,
        )
        row_costs = [sum((costs[i] for i in row), Cost(0.0, 0.0)) for row in plan]
        dealt = [plan[i] for i in deal_rows(row_costs, balance.world_size)]
        rows = [[self._buffer[i] for i in row] for row in dealt]
        self._take([i for row in dealt for i in row])
        for pending in self._buffer:
            pending.waited += 1
        return rows

    def _take(self, chosen: list[int]) -> list[_Pending]:
        """Take samples out of the buffer, by position."""
        taken = set(chosen)
        row = [self._buffer[i] for i in chosen]
        self._buffer = [p for i, p in enumerate(self._buffer) if i not in taken]
        return row

    def epoch_steps(self, epochs: float) -> int:
        """Steps that `epochs` passes over all sources take, estimated from the buffer's lengths."""
        self._top_up()
        mean_length = float(np.mean([p.length for p in self._buffer]))
        num_samples = sum(len(s.reader) for s in self.sources) * epochs
        return max(round(num_samples * mean_length / (self.seq_len * self.batch_size)), 1)

    def _top_up(self) -> None:
        while len(self._buffer) < self.look_ahead:
            self._draw()

    def _draw(self) -> None:
        """Read the next sample of the mixture into the buffer, if a row can hold it."""
        source = self._next_source()
        pending = self._read(source, self._positions[source])
        self._positions[source] += 1
        fits = pending.length <= self.seq_len
        if fits:
            self._buffer.append(pending)
            if not pending.truncated:
                return
        self.num_truncated += fits
        self.num_too_long += not fits
        if len(self.too_long) < MAX_NAMED:
            self.too_long.append(pending.sample_id)
        self._fail_if_nothing_fits()

    def _fail_if_nothing_fits(self) -> None:
        if not self._buffer and self.num_too_long > sum(len(s.reader) for s in self.sources):
            raise ValueError(f"every sample is longer than seq_len {self.seq_len}: raise seq_len")

    def _next_source(self) -> int:
        total = sum(s.weight for s in self.sources)
        for i, source in enumerate(self.sources):
            self._credits[i] += source.weight / total
        best = max(range(len(self.sources)), key=lambda i: (self._credits[i], -i))
        self._credits[best] -= 1.0
        return best

    def _read(self, source: int, position: int) -> _Pending:
        reader = self.sources[source].reader
        epoch, offset = divmod(position, len(reader))
        sample = reader[int(self._order(source, epoch)[offset])]
        whole = self.encode(sample)
        cut = None
        if len(whole.input_ids) > self.seq_len and self.truncate is not None:
            cut = self.truncate(whole)
        encoded = whole if cut is None else cut
        cost = self.balance.cost_of(encoded) if self.balance else Cost(0.0, 0.0)
        return _Pending(source, position, sample.id, encoded, cut is not None, cost)

    def _order(self, source: int, epoch: int) -> np.ndarray:
        key = (source, epoch)
        if key not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[0] != source}
            rng = np.random.default_rng([self.seed, source, epoch])
            order = rng.permutation(len(self.sources[source].reader))
            if epoch == 0:
                opens = self.sources[source].opening[order]
                order = np.concatenate([order[opens], order[~opens]])
            self._orders[key] = order
        return self._orders[key]

    def state(self) -> dict[str, Any]:
        """JSON-able position: cursors, mixing credits and which samples wait in the buffer."""
        return {
            "positions": list(self._positions),
            "credits": list(self._credits),
            "buffer": [[p.source, p.position, p.waited] for p in self._buffer],
            "stats": self.stats.state(),
            "num_too_long": self.num_too_long,
            "num_truncated": self.num_truncated,
            "too_long": list(self.too_long),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; the waiting samples are read and encoded again."""
        self._positions = list(state["positions"])
        self._credits = list(state["credits"])
        self.stats.load(state["stats"])
        self.num_too_long = state["num_too_long"]
        self.num_truncated = state["num_truncated"]
        self.too_long = list(state["too_long"])
        self._buffer = []
        for source, position, waited in state["buffer"]:
            pending = self._read(source, position)
            pending.waited = waited
            self._buffer.append(pending)


def open_sources(
    directories: Mapping[str, Path],
    weights: Mapping[str, float] | None = None,
    first_tasks: Collection[str] = (),
) -> list[Source]:
    """Open dataset directories as a mixture.

    A source without a weight counts by its size, so that unweighted sources finish their epochs
    together. Samples of `first_tasks` open the first epoch.

    Raises:
        ValueError: `weights` names no input, or `first_tasks` a task that no input holds.
    """
    weights = weights or {}
    unknown = sorted(set(weights) - set(directories))
    if unknown:
        raise ValueError(f"weights name {unknown}, the stage's inputs are {sorted(directories)}")
    sources = []
    found: set[str] = set()
    for name, directory in directories.items():
        reader = SampleReader(directory)
        weight = float(weights.get(name, len(reader)))
        if weight > 0:
            opening = np.zeros(len(reader), dtype=bool)
            if first_tasks:
                tasks = read_table(directory, ["task"])["task"].to_pylist()
                found.update(tasks)
                opening[:] = [task in first_tasks for task in tasks]
            sources.append(Source(name, reader, weight, opening))
    absent = sorted(set(first_tasks) - found)
    if absent:
        raise ValueError(f"first_tasks names {absent}, the inputs hold {sorted(found)}")
    return sources
