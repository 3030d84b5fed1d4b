"""One optimizer step: the same whatever the micro-batch, and frozen parts stay what they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.modeling import part_digests
from model.processor import Encoded
from sailyard.recipe import TrainRecipe
from tests.model import tiny
from training.engine import Engine
from training.packing import shares_of_turns


def rows() -> list[list[Encoded]]:
    """Four rows of unequal samples, with and without an image."""
    processor = tiny.processor()
    rng = np.random.default_rng(0)

    def sample(question: str, answer: str, picture: bool) -> Encoded:
        images = [tiny.image(int(rng.integers(100)))] if picture else []
        text = "<image>\n" * picture + question
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return processor.encode(turns, images)

    return [
        [sample("how many circles?", "one two three 123", True), sample("is it?", "no", False)],
        [sample("is the red square left?", "yes", True)],
        [sample("one two", "three", False), sample("how many?", "yes no yes no", True)],
        [sample("three", "two", True)],
    ]


def recipe(**changes: object) -> TrainRecipe:
    settings = {"seq_len": 128, "batch_size": 4, "micro_batch_size": 4, "threads": 1, "lr": 1e-3}
    return TrainRecipe.model_validate({**settings, "dtype": "float32", **changes})


def gradients(batch: list[list[Encoded]], **changes: object) -> dict[str, torch.Tensor]:
    """Gradients of one global batch, caught before the optimizer takes them."""
    engine = Engine(tiny.network(), recipe(**changes))
    caught: dict[str, torch.Tensor] = {}

    def catch(lr: float) -> float:
        for name, parameter in engine.model.named_parameters():
            if parameter.grad is not None:
                caught[name] = parameter.grad.clone()
        return 0.0

    engine.learner.update = catch  # type: ignore[method-assign]
    engine.step(batch, [[0] * len(row) for row in batch], 1e-3)
    return caught


@pytest.mark.parametrize("loss_norm", ["token", "square", "turn", "sample"])
def test_the_gradient_does_not_depend_on_micro_batch_and_packing(loss_norm: str) -> None:
    batch = rows()
    samples = [encoded for row in batch for encoded in row]
    whole = gradients(batch, loss_norm=loss_norm)
    ways: list[tuple[list[list[Encoded]], dict[str, int]]] = [
        (batch, {"micro_batch_size": 1}),
        (batch, {"micro_batch_size": 2}),
        ([samples], {"micro_batch_size": 1, "seq_len": 512}),
        ([[encoded] for encoded in samples], {"micro_batch_size": 2}),
    ]
    for packed, changes in ways:
        split = gradients(packed, loss_norm=loss_norm, **changes)
        assert split.keys() == whole.keys()
        for name, gradient in whole.items():
            error = (split[name] - gradient).norm() / gradient.norm().clamp_min(1e-6)
            assert error < 1e-6, name


@pytest.mark.parametrize("trainable", [["adapter"], ["vision", "adapter"], ["language"]])
def test_frozen_parts_stay_bit_identical_and_the_others_move(trainable: list[str]) -> None:
    model = tiny.network()
    before = part_digests(model)
    engine = Engine(model, recipe(trainable=trainable))
    batch = rows()
    engine.step(batch, [[0] * len(row) for row in batch], 1e-2)
    after = part_digests(model)
    assert {part for part in after if after[part] != before[part]} == set(trainable)


def test_losses_are_reported_per_source() -> None:
    engine = Engine(tiny.network(), recipe())
    batch = rows()
    sources = [[i % 2 for i in range(len(row))] for row in batch]
    result = engine.step(batch, sources, 1e-3, num_sources=2)
    assert set(result.source_loss) == {0, 1}
    low, high = min(result.source_loss.values()), max(result.source_loss.values())
    assert low <= result.loss <= high


def test_a_loss_that_is_no_number_leaves_the_weights_alone() -> None:
    model = tiny.network()
    with torch.no_grad():
        model.mlp1[1].weight.fill_(float("nan"))
    engine = Engine(model, recipe(trainable=["language"]))
    before = part_digests(model)
    batch = rows()
    assert not engine.step(batch, [[0] * len(row) for row in batch], 1e-2).finite
    assert part_digests(model) == before


def test_every_answer_weighs_one() -> None:
    mask = np.array([0, 0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 1], dtype=bool)
    shares = shares_of_turns(mask)
    assert shares.tolist() == [0, 0, 0.5, 0.5, 0, 1, 0, 0, 0.25, 0.25, 0.25, 0.25]
