"""Experts on two ranks give the output and the gradients of experts on one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from model.experts import BACKENDS
from model.experts_parallel import split_experts
from tests.model import tiny
from tests.ranks import on_ranks

TOKENS = 6  # of each rank
ROUTES = {
    "mixed": [[0, 3], [1, 2], [2, 0], [3, 1], [0, 1], [2, 3]],
    "all to the first rank": [[0, 1]] * TOKENS,
    "all to the second, one expert idle": [[2, 2]] * TOKENS,
}


def experts(backend: str, number: int = 4) -> nn.Module:
    config = tiny.language_config(moe=True)
    config.num_experts = number
    config._experts_implementation = backend
    torch.manual_seed(0)
    layer = Qwen3MoeExperts(config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return nn.ModuleDict({"experts": layer})


def inputs(rank: int) -> tuple[Tensor, Tensor]:
    """Tokens [N, D] and router weights [N, K] of a rank."""
    torch.manual_seed(rank + 1)
    return torch.randn(TOKENS, 32).requires_grad_(), torch.rand(TOKENS, 2).requires_grad_()


def run(layer: nn.Module, routes: Tensor, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    y = layer["experts"](x, routes, weights)  # type: ignore[index]
    y.square().sum().backward()
    found = {"y": y.detach(), "x": x.grad, "weights": weights.grad}
    return found | {name: p.grad for name, p in layer.named_parameters()}


def on_this_rank(autocast: bool) -> dict[str, dict[str, Tensor]]:
    with pytest.raises(ValueError, match="expert_parallel 2 does not divide the 3 experts of expe"):
        split_experts(experts("eager", 3), dist.group.WORLD)
    with pytest.raises(ValueError, match="no experts to spread"):
        split_experts(nn.Linear(1, 1), dist.group.WORLD)
    results = {}
    for backend in BACKENDS:
        for name, routes in ROUTES.items():
            layer = experts(backend)
            split_experts(layer, dist.group.WORLD)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found = run(layer, torch.tensor(routes), *inputs(dist.get_rank()))
            results[f"{backend}, {name}"] = found
    return results


@pytest.mark.slow
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-6), (True, 0.02)])
def test_spread_experts_equal_whole_ones(autocast: bool, tolerance: float, tmp_path: Path) -> None:
    first, second = on_ranks(partial(on_this_rank, autocast), 2, tmp_path)
    for key in first:
        backend, name = key.split(", ", 1)
        pairs = zip(inputs(0), inputs(1), strict=True)
        x, weights = (torch.cat(pair).detach().requires_grad_() for pair in pairs)
        expected = run(experts(backend), torch.tensor(ROUTES[name] * 2), x, weights)
        for what, value in expected.items():
            error = torch.cat([first[key][what], second[key][what]]) - value
            assert error.norm() <= tolerance * value.norm(), f"{key}: {what}"
