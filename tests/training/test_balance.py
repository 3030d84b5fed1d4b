"""Visual balance: rows of one step cost the same; nothing starves, nothing is lost."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.balance import LengthsOnly
from benchmarks.mix import INSTRUCTION, Length, draw
from model.processor import Encoded
from sailyard.plan.flops import Cost, FlopModel
from tests.model import tiny
from training.balance import Balance, balanced_rows, deal_rows, flop_model, sample_cost
from training.stream import PackedStream, Source

FLOPS = FlopModel(10.0, 0.01, 20.0, 0.001, 0.0)
SEQ_LEN = 8192


def stream(
    lengths: list[Length], *, rows: int, look_ahead: int, ranks: int | None, seq_len: int = SEQ_LEN
) -> PackedStream:
    data = LengthsOnly(lengths)

    def cost_of(encoded: Encoded) -> Cost:
        return FLOPS.cost(len(encoded.input_ids), data.patches(encoded))

    return PackedStream(
        [Source("mix", data, 1.0)],
        data.encode,
        seq_len=seq_len,
        batch_size=rows,
        look_ahead=look_ahead,
        seed=3,
        balance=Balance(ranks, cost_of) if ranks else None,
    )


def row_costs(lengths: list[Length], rows: list[list[Encoded]]) -> np.ndarray:
    """[rows, 2] vision and language FLOPs."""
    data = LengthsOnly(lengths)
    costs = [[FLOPS.cost(len(e.input_ids), data.patches(e)) for e in row] for row in rows]
    return np.array([[sum(c.vision for c in r), sum(c.language for c in r)] for r in costs])


sample = st.tuples(st.integers(1, 64), st.lists(st.integers(1, 128), max_size=2))


@settings(max_examples=60, deadline=None)
@given(st.lists(sample, min_size=24, max_size=60), st.integers(1, 4), st.randoms())
def test_rows_hold_each_sample_once_and_the_overdue_first(samples, num_rows, random) -> None:
    lengths = [length for length, _ in samples]
    costs = [FLOPS.cost(length, patches) for length, patches in samples]
    overdue = [random.random() < 0.1 for _ in samples]
    rows = balanced_rows(lengths, costs, overdue, seq_len=64, num_rows=num_rows)
    placed = [i for row in rows for i in row]
    assert len(rows) == num_rows
    assert len(set(placed)) == len(placed)
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
    # An overdue sample is left only when every row already starts with another overdue one.
    left = [i for i, late in enumerate(overdue) if late and i not in placed]
    assert not left or all(overdue[row[0]] for row in rows if row)
    assert rows == balanced_rows(lengths, costs, overdue, seq_len=64, num_rows=num_rows)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=12), st.integers(1, 4))
def test_every_rank_is_dealt_as_many_rows(vision: list[float], world_size: int) -> None:
    costs = [Cost(v, 1.0) for v in vision for _ in range(world_size)]
    order = deal_rows(costs, world_size)
    assert sorted(order) == list(range(len(costs)))
    hands = np.array([costs[i].total for i in order]).reshape(world_size, -1).sum(axis=1)
    # No rank is more than one row's cost ahead of another.
    assert hands.max() - hands.min() <= max(vision) + 1 + 1e-9


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="3 rows do not divide over 2 ranks"):
        deal_rows([Cost(1, 1)] * 3, 2)


def test_balance_evens_steps_without_losing_fill() -> None:
    lengths = draw(INSTRUCTION, 2000, any_resolution=True, seed=1)
    worst: dict[int, list[float]] = {0: [], 8: []}
    fills = {}
    for ranks, found in worst.items():
        packed = stream(lengths, rows=8, look_ahead=256, ranks=ranks or None)
        for _ in range(10):
            load = row_costs(lengths, packed.next_batch().rows).sum(axis=1)
            found.append(float(load.max() / load.mean()))
        fills[ranks] = packed.stats.summary()["packing_fill"]
    assert np.mean(worst[8]) < 1.05 < np.mean(worst[0])
    assert fills[8] > 0.97


def test_nothing_starves_and_an_epoch_shows_every_sample() -> None:
    # One page in twenty costs far more than any level allows: only its age brings it in.
    lengths = [Length(900, (16_384,)) if i % 20 == 0 else Length(200, (64,)) for i in range(400)]
    rows, look_ahead = 4, 40
    packed = stream(lengths, rows=rows, look_ahead=look_ahead, ranks=4, seq_len=1024)
    seen: Counter[str] = Counter()
    for _ in range(200):
        seen.update(packed.next_batch().ids)
        waits = [waited for _, _, waited in packed.state()["buffer"]]
        assert max(waits) <= 2 * look_ahead // rows + 1
        if len(seen) == 400:
            break
    assert len(seen) == 400


def test_a_balanced_stream_resumes_exactly_and_ranks_agree() -> None:
    lengths = draw(INSTRUCTION, 600, any_resolution=True, seed=2)

    def make() -> PackedStream:
        # So small a buffer that samples grow overdue: how long they have waited must be kept.
        return stream(lengths, rows=4, look_ahead=12, ranks=4)

    whole = make()
    expected = [whole.next_batch().ids for _ in range(20)]
    packed, seen = make(), []
    for step in range(20):
        if step in (3, 4, 9, 14):
            state = packed.state()
            packed = make()
            packed.load(state)
        seen.append(packed.next_batch().ids)
    assert seen == expected


def test_another_number_of_ranks_sees_the_same_rows() -> None:
    lengths = draw(INSTRUCTION, 600, any_resolution=True, seed=2)
    two, four = (stream(lengths, rows=4, look_ahead=64, ranks=ranks) for ranks in (2, 4))
    for _ in range(5):
        assert sorted(two.next_batch().ids) == sorted(four.next_batch().ids)


def test_the_cost_of_a_sample_is_counted_on_the_network() -> None:
    model = tiny.network()
    flops = flop_model(model)
    encoded = tiny.processor().encode(
        [{"role": "user", "content": "<image>\none"}, {"role": "assistant", "content": "two"}],
        [tiny.image(0)],
    )
    cost = sample_cost(model)(encoded)
    tokens, patches = len(encoded.input_ids), model.config.vision_config.num_patches
    tower = sum(p.numel() for p in model.vision_model.parameters())
    assert cost.vision > 2 * tower * patches * len(encoded.pixel_values)
    assert cost.language > flops.per_token * tokens
    # Twice the text costs more than twice the language, because of attention, and no more vision.
    longer = flops.cost(2 * tokens, [patches] * len(encoded.pixel_values))
    assert longer.vision == cost.vision
    assert longer.language > 2 * cost.language
