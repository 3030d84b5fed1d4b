"""Which token goes to which expert, in the order that the fused experts work in.

Shape suffixes as in `model/experts.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Routing:
    """Token slots in order of expert; slot t * K + j is the j-th choice of token t.

    Attributes:
        slot_S: [S] int32, the slot at each sorted place.
        offsets_E1: [E + 1] int32, where each expert's places begin, and S.
        weight_S: [S] router weight by slot (not sorted), float32 or float64.
        top_k: K.
    """

    slot_S: torch.Tensor
    offsets_E1: torch.Tensor
    weight_S: torch.Tensor
    top_k: int

    @property
    def token_S(self) -> torch.Tensor:
        """[S] int32, the token at each sorted place."""
        return self.slot_S // self.top_k


def route(top_k_index_NK: torch.Tensor, weight_NK: torch.Tensor, num_experts: int) -> Routing:
    """Sort the slots by expert, stably; nothing waits for the device."""
    flat = top_k_index_NK.reshape(-1)
    # A radix sort of two bytes takes a quarter of the passes of one of eight.
    key = flat.to(torch.int16) if num_experts < 2**15 else flat
    ordered, slot_S = torch.sort(key, stable=True)
    bounds = torch.arange(num_experts + 1, device=flat.device, dtype=ordered.dtype)
    return Routing(
        slot_S=slot_S.to(torch.int32),
        offsets_E1=torch.searchsorted(ordered, bounds, out_int32=True),
        weight_S=weight_NK.reshape(-1),
        top_k=top_k_index_NK.shape[-1],
    )
