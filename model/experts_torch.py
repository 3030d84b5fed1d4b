"""The products of the fused experts in plain torch: any device, any floating type, no kernels.

One matrix product per expert that got a token, straight into its slice of the result. Nothing as
large as the weights is made in the forward pass, and one zeroed tensor of their size in the
backward pass, where indexing `weight[e]` under autograd (the eager back end) makes one per expert.

Shape suffixes as in `model/experts.py`; `experts_triton.py` has the same five functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F

from model.experts_routing import Routing


def up(
    x_ND: torch.Tensor, gate_up_EGD: torch.Tensor, routing: Routing, keep: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """silu(gate) * up of every slot [S, I], and [gate; up] itself [S, G] if it is to be kept."""
    token_S = routing.token_S
    num_slots, double = token_S.numel(), gate_up_EGD.shape[1]
    gate_up_SG = x_ND.new_empty(num_slots, double)
    inner_SI = x_ND.new_empty(num_slots, double // 2)
    for expert, rows in _groups(routing):
        x = x_ND.index_select(0, token_S[rows])
        torch.mm(x, gate_up_EGD[expert].T, out=gate_up_SG[rows])
        gate, up_ = gate_up_SG[rows].chunk(2, dim=-1)
        torch.mul(F.silu(gate), up_, out=inner_SI[rows])
    return inner_SI, gate_up_SG if keep else None


def down(inner_SI: torch.Tensor, down_EDI: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Weighted sum over each token's experts of down[e] @ inner: [N, D]."""
    out_SD = inner_SI.new_empty(inner_SI.shape[0], down_EDI.shape[1])  # in order of slot
    for expert, rows in _groups(routing):
        slot = routing.slot_S[rows]
        product = inner_SI[rows] @ down_EDI[expert].T
        out_SD[slot] = (product * routing.weight_S[slot, None]).to(out_SD.dtype)
    return out_SD.view(-1, routing.top_k, out_SD.shape[1]).sum(dim=1)


def grad_inner(
    grad_ND: torch.Tensor, down_EDI: torch.Tensor, gate_up_SG: torch.Tensor, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Back through `down` and SwiGLU.

    Returns:
        gradient of [gate; up], [S, G]; the weighted inner activation, [S, I], which the gradient of
        `down` needs; the gradient of the router weights, [S] in order of slot.
    """
    inner, exact = down_EDI.shape[2], routing.weight_S.dtype
    token_S = routing.token_S
    grad_gate_up_SG = torch.empty_like(gate_up_SG)
    weighted_SI = gate_up_SG.new_empty(gate_up_SG.shape[0], inner)
    grad_weight_S = torch.empty_like(routing.weight_S)
    for expert, rows in _groups(routing):  # an expert's rows stay in the cache
        slot = routing.slot_S[rows]
        weight = routing.weight_S[slot, None]
        grad = (grad_ND.index_select(0, token_S[rows]) @ down_EDI[expert]).to(exact)
        gate, up_ = gate_up_SG[rows].to(exact).chunk(2, dim=-1)
        silu = F.silu(gate)
        inner_act = silu * up_
        grad_weight_S[slot] = (grad * inner_act).sum(dim=-1)
        grad.mul_(weight)
        grad_gate_up_SG[rows, :inner] = torch.ops.aten.silu_backward(grad * up_, gate)
        grad_gate_up_SG[rows, inner:] = grad * silu
        weighted_SI[rows] = inner_act.mul_(weight)
    return grad_gate_up_SG, weighted_SI, grad_weight_S


def grad_input(
    grad_gate_up_SG: torch.Tensor, gate_up_EGD: torch.Tensor, routing: Routing
) -> torch.Tensor:
    """Gradient of the tokens: gate_up[e]^T @ grad, summed over each token's experts: [N, D]."""
    out_SD = grad_gate_up_SG.new_empty(grad_gate_up_SG.shape[0], gate_up_EGD.shape[2])
    for expert, rows in _groups(routing):
        out_SD[routing.slot_S[rows]] = grad_gate_up_SG[rows] @ gate_up_EGD[expert]
    return out_SD.view(-1, routing.top_k, out_SD.shape[1]).sum(dim=1)


def grad_weight(
    left: torch.Tensor,
    right: torch.Tensor,
    routing: Routing,
    left_by_token: bool,
    right_by_token: bool,
) -> torch.Tensor:
    """left_e^T @ right_e for every expert e: [E, left width, right width].

    Args:
        left, right: rows in sorted order [S, ...], or by token [N, ...] where the flag says so.
    """
    token_S = routing.token_S
    num_experts = routing.offsets_E1.numel() - 1
    out = left.new_zeros(num_experts, left.shape[1], right.shape[1])
    for expert, rows in _groups(routing):
        a = left.index_select(0, token_S[rows]) if left_by_token else left[rows]
        b = right.index_select(0, token_S[rows]) if right_by_token else right[rows]
        torch.mm(a.T, b, out=out[expert])
    return out


def _groups(routing: Routing) -> Iterator[tuple[int, slice]]:
    """Experts that got a token, with their sorted places."""
    bounds = routing.offsets_E1.tolist()
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            yield expert, slice(start, end)
