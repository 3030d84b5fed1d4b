"""Muon: orthogonal steps for hidden matrices, AdamW's own for the rest."""

from __future__ import annotations

import pytest
import torch

from sailyard.recipe import TrainRecipe
from tests.model import tiny
from training.engine import Engine
from training.muon import RMS_OF_ADAMW, Muon, orthogonalised


def test_singular_values_come_near_one() -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 16, 40) * torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1)
    values = torch.linalg.svdvals(orthogonalised(stack))
    assert values.min() > 0.5
    assert values.max() < 1.5
    assert torch.equal(orthogonalised(torch.zeros(1, 4, 8)), torch.zeros(1, 4, 8))


@pytest.mark.parametrize("shape", [(24, 96), (96, 24)])
def test_a_step_has_the_size_of_adamws(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.zeros(shape))
    optimizer = Muon([{"params": [matrix], "muon": True}], lr=0.1, weight_decay=0.0)
    matrix.grad = torch.randn(shape)
    optimizer.step()
    rms = matrix.detach().pow(2).mean().sqrt().item()
    assert rms == pytest.approx(0.1 * RMS_OF_ADAMW, rel=0.25)


def test_other_groups_step_as_adamw_does() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(8), torch.randn(8)
    ends = []
    for kind in (Muon, torch.optim.AdamW):
        vector = torch.nn.Parameter(start.clone())
        optimizer = kind([{"params": [vector], "muon": False}], lr=0.1)
        for _ in range(3):
            vector.grad = gradient.clone()
            optimizer.step()
        ends.append(vector.detach())
    assert torch.equal(*ends)


def test_the_engine_gives_muon_hidden_matrices_only() -> None:
    settings = {"seq_len": 128, "batch_size": 4, "optimizer": "muon", "dtype": "float32"}
    model = tiny.network()
    engine = Engine(model, TrainRecipe.model_validate(settings))
    names = {id(p): name for name, p in model.named_parameters()}
    chosen = {
        names[id(p)]
        for g in engine.learner.optimizer.param_groups
        if g["muon"]
        for p in g["params"]
    }
    assert "mlp1.1.weight" in chosen
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in chosen
    assert not any("embed" in name or "lm_head" in name or "norm" in name for name in chosen)
    taken = [p for g in engine.learner.optimizer.param_groups for p in g["params"]]
    assert len(taken) == len(list(model.parameters()))
