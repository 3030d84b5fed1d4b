"""Visual balance: rows of one step that cost the same, dealt evenly to ranks (paper section 5).

A packed row is full of tokens whatever is in it, but a visual token costs the tower's four patches
before it costs the decoder anything, and a large image's patches all see each other. Ranks wait for
the slowest of them at every step, so rows are chosen from the look-ahead buffer to be alike in
vision cost, in language cost and in tokens at once. The paper names the constraint and no
algorithm; this one is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from model.config import SailVLConfig
from model.counting import count_model
from model.modeling import SailVLForConditionalGeneration
from model.processor import Encoded
from sailyard.plan.flops import Cost, FlopModel

# A row that leaves this little empty and undone (shares of a row) is closed at once.
GOOD_ENOUGH = 0.004
# Samples that may close a row are tried in pairs, so only so many of the oldest are looked at.
MAX_CANDIDATES = 160
# Vision cost per row that a step is planned for, relative to the buffer's average.
LEVELS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
# How far above the level a row may go.
SLACK = 0.03


@dataclass(frozen=True, slots=True)
class Balance:
    """How a stream evens its rows.

    Attributes:
        world_size: ranks that a step's rows are dealt to.
        cost_of: forward FLOPs of a sample (any unit will do, the same for both parts).
    """

    world_size: int
    cost_of: Callable[[Encoded], Cost]


def sample_cost(model: SailVLForConditionalGeneration) -> Callable[[Encoded], Cost]:
    """The cost function of a network: weights and attention of both parts, from its own counts."""
    flops = flop_model(model)
    tile_patches = model.config.vision_config.num_patches

    def cost_of(encoded: Encoded) -> Cost:
        return flops.cost(len(encoded.input_ids), patches_of(encoded, tile_patches))

    return cost_of


def flop_model(model: SailVLForConditionalGeneration) -> FlopModel:
    """FLOP coefficients of a network, on any device."""
    config: SailVLConfig = model.config
    vision, text, counted = config.vision_config, config.text_config, count_model(model)
    return FlopModel.of_network(
        vision_params=counted.vision,
        adapter_params=counted.adapter,
        active_params=counted.active_without_embeddings,
        vision_layers=vision.num_hidden_layers,
        vision_width=vision.hidden_size,
        downsample=config.downsample,
        language_layers=text.num_hidden_layers,
        language_attention_width=text.num_attention_heads * text.head_dim,
        language_width=text.hidden_size,
        vocab_size=text.vocab_size,
    )


def patches_of(encoded: Encoded, tile_patches: int) -> list[int]:
    """Patches of each image, or of each tile where images are cut into tiles."""
    if encoded.image_grids is not None:
        return [int(rows * columns) for rows, columns in encoded.image_grids]
    return [tile_patches] * len(encoded.pixel_values)


@dataclass(slots=True)
class _Pool:
    """The buffer as arrays, costs in units of the row average; `free` marks what is not taken."""

    length: np.ndarray  # [n] tokens
    vision: np.ndarray  # [n]
    total: np.ndarray  # [n] vision + language
    free: np.ndarray  # [n] bool

    def take(self, index: int) -> None:
        self.free[index] = False


def balanced_rows(
    lengths: Sequence[int],
    costs: Sequence[Cost],
    overdue: Sequence[bool],
    *,
    seq_len: int,
    num_rows: int,
) -> list[list[int]]:
    """Choose buffer positions for all rows of one step.

    A step is planned for several levels of vision cost per row, around what the buffer holds on
    average, and the most even and fullest plan wins: pages that cost twice the average then meet in
    one step instead of each making its own step wait, and lighter samples fill the steps between.
    Overdue samples are placed first whatever they cost, so nothing waits for ever.

    Args:
        lengths: tokens of the buffer's samples, oldest first, none above `seq_len`.
        costs: of the same samples.
        overdue: which of them may wait no longer.
        num_rows: rows of one step over all ranks.
    """
    rows_held = max(sum(lengths) / seq_len, 1e-9)
    total = np.array([cost.total for cost in costs])
    unit = max(float(total.sum()) / rows_held, 1e-9)
    vision = np.array([cost.vision for cost in costs]) / unit
    pool = _Pool(np.array(lengths), vision, total / unit, np.ones(len(lengths), dtype=bool))
    mean_vision = float(vision.sum()) / rows_held
    levels = [mean_vision * share for share in LEVELS] if mean_vision > 0 else [0.0]
    plans = [_plan(pool, np.flatnonzero(overdue), level, seq_len, num_rows) for level in levels]
    return min(plans, key=lambda plan: _badness(plan, pool, seq_len))


def _badness(rows: list[list[int]], pool: _Pool, seq_len: int) -> float:
    """Time a step loses: ranks that wait, and slots that hold nothing."""
    if not all(rows):
        return float("inf")
    loads = np.array([pool.total[row].sum() for row in rows])
    fill = sum(int(pool.length[row].sum()) for row in rows) / (len(rows) * seq_len)
    return float(loads.max() / loads.mean() / fill)


def _plan(
    pool: _Pool, overdue: np.ndarray, level: float, seq_len: int, num_rows: int
) -> list[list[int]]:
    pool = _Pool(pool.length, pool.vision, pool.total, np.ones_like(pool.free))
    rows: list[list[int]] = []
    forced: list[int] = overdue.tolist()
    for _ in range(num_rows):
        forced = [i for i in forced if pool.free[i]]
        seed = forced[0] if forced else _dearest(pool, level)
        rows.append(_fill(pool, seed, level, seq_len) if seed >= 0 else [])
    return rows


def _dearest(pool: _Pool, level: float) -> int:
    """The free sample with most vision that a row of this level can take, or the cheapest."""
    free = np.flatnonzero(pool.free)
    if not len(free):
        return -1
    within = free[pool.vision[free] <= level * (1 + SLACK)]
    if not len(within):
        return int(free[np.argmin(pool.vision[free])])
    # Among equals the longest first, then the oldest.
    return int(within[np.lexsort((-pool.length[within], -pool.vision[within]))[0]])


def _fill(pool: _Pool, seed: int, level: float, seq_len: int) -> list[int]:
    """One row from `seed` on: towards the level of vision cost, then closed as full as can be."""
    chosen = [seed]
    pool.take(seed)
    space = seq_len - int(pool.length[seed])
    need = level - float(pool.vision[seed])
    while True:
        fitting = np.flatnonzero(pool.free & (pool.length <= space))
        # More vision than the level is what other ranks would wait for.
        fitting = fitting[pool.vision[fitting] <= max(need, 0.0) + SLACK * level]
        if not len(fitting):
            return chosen
        closing, score = _close(pool, fitting[:MAX_CANDIDATES], space, need, seq_len)
        shortest = int(pool.length[fitting].min())
        if score < GOOD_ENOUGH or space < 3 * shortest:
            picks = closing
        else:
            due = max(need, 0.0) * pool.length[fitting] / space
            drift = np.abs(pool.vision[fitting] - due)
            # Long samples first, as in every good fit: short ones close rows better.
            picks = [int(fitting[np.argmin(drift - 0.2 * pool.length[fitting] / seq_len)])]
        for pick in picks:
            chosen.append(pick)
            pool.take(pick)
            space -= int(pool.length[pick])
            need -= float(pool.vision[pick])


def _close(
    pool: _Pool, fitting: np.ndarray, space: int, need: float, seq_len: int
) -> tuple[list[int], float]:
    """The one or two candidates that leave the least empty and undone, and how much that is."""
    length, vision = pool.length[fitting], pool.vision[fitting]
    single = (space - length) / seq_len + np.abs(need - vision)
    one = int(np.argmin(single))
    best, score = [int(fitting[one])], float(single[one])
    if len(fitting) > 1:
        waste = space - length[:, None] - length[None, :]
        pair = waste / seq_len + np.abs(need - vision[:, None] - vision[None, :])
        pair[waste < 0] = np.inf
        np.fill_diagonal(pair, np.inf)
        first, second = divmod(int(np.argmin(pair)), len(fitting))
        if pair[first, second] < score:
            best = [int(fitting[first]), int(fitting[second])]
            score = float(pair[first, second])
    return best, score


def deal_rows(costs: Sequence[Cost], world_size: int) -> list[int]:
    """Order rows so that equal slices of them, one per rank, cost the same.

    Dearest first, each to the rank with the least so far that still has room (longest processing
    time rule). Returns row numbers, rank after rank.

    Raises:
        ValueError: the rows do not divide evenly over the ranks.
    """
    per_rank, rest = divmod(len(costs), world_size)
    if rest or not per_rank:
        raise ValueError(
            f"{len(costs)} rows do not divide over {world_size} ranks: make batch_size a multiple "
            "of the number of ranks"
        )
    hands: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0.0] * world_size
    for row in sorted(range(len(costs)), key=lambda i: (-costs[i].total, i)):
        rank = min(
            (r for r in range(world_size) if len(hands[r]) < per_rank), key=lambda r: (loads[r], r)
        )
        hands[rank].append(row)
        loads[rank] += costs[row].total
    return [row for hand in hands for row in hand]
