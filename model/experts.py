"""Experts back ends: which one runs, and our fused one, `sailyard_fused`.

transformers dispatches a mixture's experts by name (`experts_implementation`): "eager" is a loop
over experts, "grouped_mm" is torch's grouped GEMM. Ours sorts the token slots by expert once and
runs the whole feed-forward, weights and sum included, as one autograd function. Its products are
Triton kernels on a GPU (`experts_triton.py`) and plain torch everywhere else (`experts_torch.py`);
the mathematics below is the same for both.

Shape suffixes: N tokens, K experts per token, S = N * K slots in order of expert, E experts,
D decoder width, I width inside an expert, G = 2 * I (gate rows, then up rows).
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from model import experts_torch
from model.experts_routing import Routing, route

BACKEND = "sailyard_fused"
BACKENDS = ("eager", "grouped_mm", BACKEND)
OVERRIDE = "SAILYARD_EXPERTS"  # environment variable: a matter of the machine, not of the recipe


def choose_experts(requested: str | None = None) -> str:
    """The back end for this machine: ours where Triton can drive a GPU, else torch's grouped GEMM.

    Args:
        requested: a name of `BACKENDS`; without one the environment's `SAILYARD_EXPERTS` counts.

    Raises:
        ValueError: a name that is no back end.
    """
    requested = requested or os.environ.get(OVERRIDE)
    if requested:
        if requested not in BACKENDS:
            raise ValueError(
                f"there is no experts back end {requested!r} ({OVERRIDE} or the argument); "
                f"use {', '.join(BACKENDS)}"
            )
        return requested
    return BACKEND if torch.cuda.is_available() and _triton_drives("cuda") else "grouped_mm"


def fused_experts_forward(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The experts of a layer on its tokens, in the form that transformers' interface asks for.

    Args:
        module: SwiGLU experts with `gate_up_proj` [E, 2I, D] and `down_proj` [E, D, I].
        hidden_states: [N, D].
        top_k_index: [N, K] int64.
        top_k_weights: [N, K].

    Returns:
        [N, D] in the type of `hidden_states`. Under autocast the products are in its type.

    Raises:
        ValueError: experts of another form (biases, transposed weights, no SiLU, split over ranks).
    """
    _check(module)
    gate_up: torch.Tensor = module.gate_up_proj
    down: torch.Tensor = module.down_proj
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else gate_up.dtype
    weight = top_k_weights.to(torch.promote_types(dtype, torch.float32))
    out: torch.Tensor = _FusedExperts.apply(
        hidden_states.to(dtype),
        gate_up.to(dtype),
        down.to(dtype),
        weight,
        top_k_index,
        torch.is_grad_enabled(),
    )
    return out.to(hidden_states.dtype)


class _FusedExperts(torch.autograd.Function):
    """y[t] = sum_j w[t, j] * down[e] @ (silu(g) * u), with [g; u] = gate_up[e] @ x[t].

    Kept for the backward pass: x, [g; u] of every slot, the routing. The inner activation is made
    again from [g; u], and the gradient of w comes from it and dy @ down[e], so that the output of
    the experts before the sum is never needed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: torch.Tensor,
        gate_up_EGD: torch.Tensor,
        down_EDI: torch.Tensor,
        weight_NK: torch.Tensor,
        top_k_index_NK: torch.Tensor,
        keep: bool,
    ) -> torch.Tensor:
        x_ND = x_ND.contiguous()
        ops = _ops(x_ND)
        routing = route(top_k_index_NK, weight_NK, gate_up_EGD.shape[0])
        inner_SI, gate_up_SG = ops.up(x_ND, gate_up_EGD, routing, keep)
        if keep:
            ctx.save_for_backward(
                x_ND,
                gate_up_EGD,
                down_EDI,
                gate_up_SG,
                routing.slot_S,
                routing.offsets_E1,
                routing.weight_S,
            )
            ctx.top_k = routing.top_k
        out_ND: torch.Tensor = ops.down(inner_SI, down_EDI, routing)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_ND, gate_up_EGD, down_EDI, gate_up_SG, slot_S, offsets_E1, weight_S = ctx.saved_tensors
        routing = Routing(slot_S, offsets_E1, weight_S, ctx.top_k)
        needs_x, needs_gate_up, needs_down, needs_weight = ctx.needs_input_grad[:4]
        ops = _ops(x_ND)
        grad_ND = grad_ND.contiguous()
        grad_gate_up_SG, weighted_SI, grad_weight_S = ops.grad_inner(
            grad_ND, down_EDI, gate_up_SG, routing
        )
        grad_x = ops.grad_input(grad_gate_up_SG, gate_up_EGD, routing) if needs_x else None
        # Routers trained alone (expert calibration) ask for neither of these two.
        grad_gate_up = (
            ops.grad_weight(grad_gate_up_SG, x_ND, routing, False, True) if needs_gate_up else None
        )
        grad_down = (
            ops.grad_weight(grad_ND, weighted_SI, routing, True, False) if needs_down else None
        )
        grad_weight = grad_weight_S.view(-1, ctx.top_k) if needs_weight else None
        return grad_x, grad_gate_up, grad_down, grad_weight, None, None


def runs_on(x: torch.Tensor) -> str:
    """What multiplies tokens of this device and type in our back end: "triton" or "torch"."""
    return "torch" if _ops(x) is experts_torch else "triton"


def _ops(x: torch.Tensor) -> ModuleType:
    """The module whose products run on this tensor's device and type."""
    kind = "cuda" if x.is_cuda else x.device.type
    if x.dtype in (torch.bfloat16, torch.float16, torch.float32) and _triton_drives(kind):
        from model import experts_triton  # Triton is not on every machine

        return experts_triton
    return experts_torch


def _triton_drives(device: str) -> bool:
    """Whether Triton is installed and can run there; on CPU only as its (slow) interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    return device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def _check(module: Any) -> None:
    odd = [
        what
        for what, found in (
            ("biases", module.has_bias),
            ("transposed weights", module.is_transposed),
            ("interleaved gate and up rows", not module.is_concatenated),
            ("no gate", not module.has_gate),
            ("a norm after the experts", module.has_post_expert_norm),
            ("experts split over ranks", module._is_expert_parallel),
            (f"activation {module.config.hidden_act!r}", module.config.hidden_act != "silu"),
        )
        if found
    ]
    if odd:
        raise ValueError(
            f"experts_implementation {BACKEND!r} does not know {odd[0]}; "
            f"load the model with experts_implementation='grouped_mm'"
        )


ALL_EXPERTS_FUNCTIONS.register(BACKEND, fused_experts_forward)
