"""The stream of packed batches: a deterministic function of the data, the seed and a small state.

Every rank makes the same sequence of steps, for a plan needs the lengths and costs of all samples
in the buffer. These follow from texts and image headers; images are decoded by the rank whose rows
they come to lie in, once they do. Nothing is prefetched past the state: a resumed run sees exactly
the samples that the undisturbed run would have seen, in the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from model.processor import Encoded
from sailyard.plan.flops import Cost
from sailyard.samples import OpenFile, Sample, SampleReader, read_table
from sailyard.stage import Rank
from training.balance import Balance, balanced_rows, deal_rows
from training.packing import PackingStats, fill_row
from training.shuffle import BlockShuffle

# How many samples that were too long a stage names; it counts them all.
MAX_NAMED = 100


class Samples(Protocol):
    """Random access to a dataset of shards; see `sailyard.samples.SampleReader`."""

    rows: list[int]

    def __getitem__(self, index: int) -> Sample: ...

    def prepare(self, shards: Sequence[int]) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class Source:
    """One dataset of a mixture.

    `weight` is its share of the draws, relative to the other sources. `opening` [N] is true for
    the samples that the first epoch begins with, None if it begins with any.
    """

    name: str
    reader: Samples
    weight: float
    opening: np.ndarray | None = None

    def __len__(self) -> int:
        """Samples."""
        return sum(self.reader.rows)


@dataclass(slots=True)
class StreamBatch:
    """Samples dealt to rows, not yet collated, and where each came from.

    With `n` rows over `w` ranks, the rows of rank `r` are those from `r * n / w` on; images of the
    others' rows are not decoded.
    """

    rows: list[list[Encoded]]
    sources: list[list[int]]  # index into the stream's sources, per row and sample
    ids: list[str]


@dataclass(slots=True)
class _Pending:
    source: int
    position: int  # how many samples of the source were drawn before this one
    sample: Sample
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
    at its weight; each epoch of a source is shuffled anew (`BlockShuffle`) by (seed, source,
    epoch), the first one with the source's opening samples before the others.

    A sample longer than a row is cut by `truncate` where that is given and can, else left out;
    both are counted and the first hundred are named. All ranks of a run make the same stream and
    take their own rows of each batch: `decode` completes the samples of `rank`'s rows, in `workers`
    threads.

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
        decode: Callable[[Sample, Encoded], Encoded] | None = None,
        rank: Rank | None = None,
        workers: int = 1,
    ) -> None:
        empty = [s.name for s in sources if len(s) == 0]
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
        self._decode, self._rank = decode, rank or Rank()
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._orders = [
            BlockShuffle(s.reader.rows, (seed, number), s.opening, s.reader.prepare)
            for number, s in enumerate(sources)
        ]

    def next_batch(self) -> StreamBatch:
        """The next `batch_size` rows of `seq_len` tokens."""
        rows = self._plain_rows() if self.balance is None else self._balanced_rows(self.balance)
        self.stats.add([[p.length for p in row] for row in rows], self.seq_len)
        return StreamBatch(
            rows=self._completed(rows),
            sources=[[p.source for p in row] for row in rows],
            ids=[p.sample.id for row in rows for p in row],
        )

    def close(self) -> None:
        """End the threads and close the datasets."""
        self._workers.shutdown(cancel_futures=True)
        for source in self.sources:
            source.reader.close()

    def _completed(self, rows: list[list[_Pending]]) -> list[list[Encoded]]:
        """What the rows hold, the own ones with their pixels."""
        encoded = [[p.encoded for p in row] for row in rows]
        if self._decode is None:
            return encoded
        share = len(rows) // self._rank.size
        own = slice(self._rank.number * share, (self._rank.number + 1) * share)
        samples = [p.sample for row in rows[own] for p in row]
        done = self._workers.map(self._decode, samples, [e for row in encoded[own] for e in row])
        encoded[own] = [[next(done) for _ in row] for row in rows[own]]
        return encoded

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
        num_samples = sum(len(s) for s in self.sources) * epochs
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
            self.too_long.append(pending.sample.id)
        self._fail_if_nothing_fits()

    def _fail_if_nothing_fits(self) -> None:
        if not self._buffer and self.num_too_long > sum(len(s) for s in self.sources):
            raise ValueError(f"every sample is longer than seq_len {self.seq_len}: raise seq_len")

    def _next_source(self) -> int:
        total = sum(s.weight for s in self.sources)
        for i, source in enumerate(self.sources):
            self._credits[i] += source.weight / total
        best = max(range(len(self.sources)), key=lambda i: (self._credits[i], -i))
        self._credits[best] -= 1.0
        return best

    def _read(self, source: int, position: int) -> _Pending:
        sample = self.sources[source].reader[self._orders[source].sample_at(position)]
        whole = self.encode(sample)
        cut = None
        if len(whole.input_ids) > self.seq_len and self.truncate is not None:
            cut = self.truncate(whole)
        encoded = whole if cut is None else cut
        cost = self.balance.cost_of(encoded) if self.balance else Cost(0.0, 0.0)
        return _Pending(source, position, sample, encoded, cut is not None, cost)

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
    datasets: Mapping[str, Path | OpenFile],
    weights: Mapping[str, float] | None = None,
    first_tasks: Collection[str] = (),
) -> list[Source]:
    """Open datasets as a mixture.

    A source without a weight counts by its size, so that unweighted sources finish their epochs
    together. Samples of `first_tasks` open the first epoch; which these are takes reading every
    shard once.

    Raises:
        ValueError: `weights` names no input, or `first_tasks` a task that no input holds.
    """
    weights = weights or {}
    unknown = sorted(set(weights) - set(datasets))
    if unknown:
        raise ValueError(f"weights name {unknown}, the stage's inputs are {sorted(datasets)}")
    sources = []
    found: set[str] = set()
    for name, data in datasets.items():
        reader = SampleReader(data)
        weight = float(weights.get(name, len(reader)))
        if weight > 0:
            opening = None
            if first_tasks:
                tasks = read_table(data, ["task"])["task"].to_pylist()
                found.update(tasks)
                opening = np.array([task in first_tasks for task in tasks], dtype=bool)
            sources.append(Source(name, reader, weight, opening))
    absent = sorted(set(first_tasks) - found)
    if absent:
        raise ValueError(f"first_tasks names {absent}, the inputs hold {sorted(found)}")
    return sources
