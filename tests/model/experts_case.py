"""One layer of experts with its tokens, and what a back end makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

RESULTS = ("output", "tokens", "router weights", "gate and up", "down")


@dataclass
class Case:
    """A Qwen3-MoE layer: experts, tokens [N, D], choices and weights [N, K], and dL/dy [N, D]."""

    experts: Qwen3MoeExperts
    tokens: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    grad: torch.Tensor

    def run(self, backend: str) -> dict[str, torch.Tensor]:
        """The output and the gradients of tokens, router weights and both expert weights."""
        self.experts.config._experts_implementation = backend
        self.experts.zero_grad(set_to_none=True)
        tokens = self.tokens.detach().requires_grad_()  # strides as they are
        weights = self.weights.detach().requires_grad_()
        out = self.experts(tokens, self.index, weights)
        out.backward(self.grad)
        grads = (self.experts.gate_up_proj.grad, self.experts.down_proj.grad)
        return dict(zip(RESULTS, (out.detach(), tokens.grad, weights.grad, *grads), strict=True))


def make_case(
    num_tokens: int,
    width: int,
    inner: int,
    num_experts: int,
    top_k: int,
    *,
    idle: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    """Random layer and tokens; the first `idle` experts get no token."""
    generator = torch.Generator().manual_seed(num_tokens * 100 + top_k)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    config = Qwen3MoeConfig(
        hidden_size=width,
        moe_intermediate_size=inner,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
    )
    experts = Qwen3MoeExperts(config).to(device=device, dtype=dtype)
    for parameter in experts.parameters():
        parameter.data = normal(*parameter.shape) * parameter.shape[-1] ** -0.5
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    logits[:, :idle] -= 100
    weights, index = logits.softmax(-1).topk(top_k)
    return Case(
        experts,
        normal(num_tokens, width),
        index.to(device),
        weights.to(device=device, dtype=dtype),
        normal(num_tokens, width),
    )


def assert_same(
    found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float
) -> None:
    """Every result within `tolerance` of the wanted one, relative to its norm."""
    for name in RESULTS:
        error = (found[name].double() - wanted[name].double()).norm()
        size = wanted[name].double().norm()
        assert error <= tolerance * size, f"{name}: off by {float(error / size):.1e}"
