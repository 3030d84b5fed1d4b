"""The products of the fused experts as launches of the Triton kernels of `experts_kernels.py`.

The same five functions as `experts_torch.py`, with the same shapes and suffixes (legend in
`experts.py`). Nothing here waits for the device. The kernels were checked for their results in
Triton's interpreter; no GPU has timed or tuned them yet (docs/moe.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton

from model import experts_kernels as kernels
from model.experts_routing import Routing


def up(
    x_ND: torch.Tensor, gate_up_EGD: torch.Tensor, routing: Routing, keep: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    num_slots = routing.slot_S.numel()
    num_experts, double, width = gate_up_EGD.shape
    inner_SI = x_ND.new_empty(num_slots, double // 2)
    gate_up_SG = x_ND.new_empty(num_slots, double) if keep else None
    if num_slots:
        kernels.up_kernel[_row_grid(num_slots, num_experts, double // 2)](
            x_ND,
            gate_up_EGD.contiguous(),
            inner_SI,
            gate_up_SG if gate_up_SG is not None else inner_SI,
            routing.slot_S,
            routing.offsets_E1,
            _rows_class(num_slots, num_experts),
            TOP_K=routing.top_k,
            EXPERTS=num_experts,
            PADDED=triton.next_power_of_2(num_experts),
            WIDTH=width,
            INNER=double // 2,
            KEEP=keep,
            PRECISION=_precision(),
        )
    return inner_SI, gate_up_SG


def down(inner_SI: torch.Tensor, down_EDI: torch.Tensor, routing: Routing) -> torch.Tensor:
    inner = down_EDI.shape[2]
    return _rows(inner_SI, down_EDI, routing, down_EDI.shape[1], (1, inner), routing.weight_S)


def grad_inner(
    grad_ND: torch.Tensor, down_EDI: torch.Tensor, gate_up_SG: torch.Tensor, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_slots = gate_up_SG.shape[0]
    num_experts, width, inner = down_EDI.shape
    grad_gate_up_SG = torch.empty_like(gate_up_SG)
    weighted_SI = gate_up_SG.new_empty(num_slots, inner)
    partial = torch.zeros(triton.cdiv(inner, kernels.MIN_BLOCK_N), num_slots, device=grad_ND.device)
    if num_slots:
        kernels.grad_inner_kernel[_row_grid(num_slots, num_experts, inner)](
            grad_ND,
            down_EDI.contiguous(),
            gate_up_SG,
            grad_gate_up_SG,
            weighted_SI,
            partial,
            routing.weight_S,
            routing.slot_S,
            routing.offsets_E1,
            num_slots,
            _rows_class(num_slots, num_experts),
            TOP_K=routing.top_k,
            EXPERTS=num_experts,
            PADDED=triton.next_power_of_2(num_experts),
            WIDTH=width,
            INNER=inner,
            PRECISION=_precision(),
        )
    return grad_gate_up_SG, weighted_SI, partial.sum(dim=0)


def grad_input(
    grad_gate_up_SG: torch.Tensor, gate_up_EGD: torch.Tensor, routing: Routing
) -> torch.Tensor:
    width = gate_up_EGD.shape[2]
    return _rows(grad_gate_up_SG, gate_up_EGD, routing, width, (width, 1), None)


def grad_weight(
    left: torch.Tensor,
    right: torch.Tensor,
    routing: Routing,
    left_by_token: bool,
    right_by_token: bool,
) -> torch.Tensor:
    num_experts = routing.offsets_E1.numel() - 1
    rows, columns = left.shape[1], right.shape[1]
    out = left.new_empty(num_experts, rows, columns)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        tiles = triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(columns, meta["BLOCK_N"])
        return (num_experts * tiles,)

    kernels.grad_weight_kernel[grid](
        left,
        right,
        out,
        routing.slot_S,
        routing.offsets_E1,
        _rows_class(routing.slot_S.numel(), num_experts),
        TOP_K=routing.top_k,
        LEFT=rows,
        RIGHT=columns,
        LEFT_BY_TOKEN=left_by_token,
        RIGHT_BY_TOKEN=right_by_token,
        PRECISION=_precision(),
    )
    return out


def _rows(
    a_SK: torch.Tensor,
    b_E: torch.Tensor,
    routing: Routing,
    width: int,
    strides: tuple[int, int],
    scale_S: torch.Tensor | None,
) -> torch.Tensor:
    """Grouped GEMM into slots, then the sum over each token's slots: [N, width]."""
    num_slots, depth = a_SK.shape
    num_experts = b_E.shape[0]
    out_SD = a_SK.new_empty(num_slots, width)
    out_ND = a_SK.new_empty(num_slots // routing.top_k, width)
    if not num_slots:
        return out_ND
    kernels.rows_kernel[_row_grid(num_slots, num_experts, width)](
        a_SK,
        b_E.contiguous(),
        out_SD,
        scale_S if scale_S is not None else out_SD,
        routing.slot_S,
        routing.offsets_E1,
        _rows_class(num_slots, num_experts),
        EXPERTS=num_experts,
        PADDED=triton.next_power_of_2(num_experts),
        DEPTH=depth,
        WIDTH=width,
        STRIDE_K=strides[0],
        STRIDE_N=strides[1],
        SCALE=scale_S is not None,
        PRECISION=_precision(),
    )
    block = min(1024, triton.next_power_of_2(width))
    kernels.sum_slots_kernel[(out_ND.shape[0], triton.cdiv(width, block))](
        out_SD, out_ND, TOP_K=routing.top_k, WIDTH=width, BLOCK=block
    )
    return out_ND


def _row_grid(
    num_slots: int, num_experts: int, width: int
) -> Callable[[dict[str, Any]], tuple[int]]:
    """At most this many tiles: every expert that got a token may leave one row tile unfilled."""
    hit = min(num_slots, num_experts)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        rows = (num_slots + hit * (meta["BLOCK_M"] - 1)) // meta["BLOCK_M"]
        return (rows * triton.cdiv(width, meta["BLOCK_N"]),)

    return grid


def _rows_class(num_slots: int, num_experts: int) -> int:
    """Rows per expert as a power of two from 16 to 128: what the tuner tells cases apart by."""
    return int(min(128, max(16, triton.next_power_of_2(num_slots // num_experts))))


def _precision() -> str:
    """How float32 is multiplied, as torch's own products do it here."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
