"""Two groups of two ranks, each with the experts once between them, train as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sailyard.recipe import TrainRecipe
from sailyard.stage import Rank
from tests.model import tiny
from tests.ranks import on_ranks
from tests.training.test_engine import recipe, rows
from training.engine import Engine
from training.expert_parallel import spread_experts
from training.world import World

STEPS = 3


def train(micro_batch_size: int, copies: int) -> dict[str, Any]:
    """Steps of two micro-batches, a checkpoint that is read back, and one more step.

    Args:
        copies: How often each of the four rows stands before the next, 1 or 2; each is there twice.
            So a micro-batch of one process holds the rows that four ranks see at a time, over which
            experts are balanced.
    """
    settings = {"parallel": "ddp", "expert_parallel": 2, "clip_norm": 0.5}
    model = tiny.network(moe=True)
    engine = Engine(model, recipe(micro_batch_size=micro_batch_size, **settings))
    twice = [row for row in rows() for _ in range(copies)] * (2 // copies)
    batch = engine.world.own(twice)
    sources = [[0] * len(row) for row in batch]
    results = [engine.step(batch, sources, 1e-2) for _ in range(STEPS)]
    saved = engine.learner.tensors()
    engine.learner.load(saved)
    results.append(engine.step(batch, sources, 1e-2))
    return {
        "loss": [result.loss for result in results],
        "norm": [result.grad_norm for result in results],
        "parts": results[0].part_norms,
        "saved": saved,
        "held": sum(p.numel() for p in engine.model.parameters()),
        "whole": {
            name: value.clone() for name, value in engine.learner.whole().state_dict().items()
        },
    }


def on_this_rank() -> dict[str, Any]:
    return train(micro_batch_size=1, copies=2)


@pytest.mark.slow
def test_four_ranks_train_as_one(tmp_path: Path) -> None:
    alone = train(micro_batch_size=4, copies=1)
    found = on_ranks(on_this_rank, 4, tmp_path)
    for rank in found:
        assert rank["loss"] == pytest.approx(alone["loss"], abs=1e-5)
        assert rank["norm"] == pytest.approx(alone["norm"], rel=1e-4)
        assert rank["norm"] == found[0]["norm"]  # bit for bit, or clipping would part the weights
        assert rank["parts"] == pytest.approx(alone["parts"], rel=1e-4)
        assert rank["held"] < 0.9 * alone["held"]
    saved: dict[str, Tensor] = {}
    for rank in found:
        assert not saved.keys() & rank["saved"].keys()
        saved |= rank["saved"]
    assert_close(saved, alone["saved"])
    assert_close(found[0]["whole"], alone["whole"])


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        error = (found[name] - value).double().norm() / value.double().norm().clamp_min(1e-3)
        assert error < 1e-4, f"{name}: {error}"


def test_a_group_that_does_not_divide_the_ranks_is_refused() -> None:
    world = World(Rank(number=0, size=3, local=0), torch.device("cpu"))
    with pytest.raises(ValueError, match="expert_parallel 2 does not divide the 3 ranks"):
        spread_experts(tiny.network(moe=True), 2, world)


def test_it_goes_with_ddp_alone() -> None:
    with pytest.raises(ValueError, match="expert_parallel 2 goes with parallel ddp: zero2"):
        TrainRecipe(expert_parallel=2)
