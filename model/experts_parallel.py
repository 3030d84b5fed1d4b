"""Experts spread over ranks: a token travels to the ranks that hold its experts, and back.

Rank p of a group of P keeps experts p * E / P up to (p + 1) * E / P of every layer. The model's own
back end multiplies what arrives. A layer exchanges twice, slots out and results back, and twice
more in its backward pass, so all ranks of a group must run the same passes in the same order.

Shape suffixes: N tokens of this rank, K experts per token, S = N * K slots in order of expert, R
slots that arrive here, E experts of the whole layer, D decoder width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


def split_experts(model: nn.Module, group: dist.ProcessGroup) -> list[str]:
    """Leave every layer its share of the experts, and let tokens travel over `group`.

    Returns:
        The names of the parameters that are shares now, [E / P, ...].

    Raises:
        ValueError: no experts, or a number that the group does not divide.
    """
    place, size = dist.get_rank(group), dist.get_world_size(group)
    names = []
    for prefix, module in model.named_modules():
        if not isinstance(module, Qwen3MoeExperts):
            continue
        if module.num_experts % size:
            raise ValueError(
                f"expert_parallel {size} does not divide the {module.num_experts} experts of "
                f"{prefix}"
            )
        module.num_experts //= size
        for name, whole in list(module.named_parameters(recurse=False)):
            share = whole.detach().chunk(size)[place].clone()  # or the whole would stay in memory
            setattr(module, name, nn.Parameter(share, whole.requires_grad))
            names.append(f"{prefix}.{name}")
        module.forward = partial(_exchanged, module.forward, module.num_experts, group)
    if not names:
        raise ValueError("expert_parallel: the model has no experts to spread over ranks")
    return names


def _exchanged(
    experts: Experts,
    num_local: int,
    group: dist.ProcessGroup,
    hidden_ND: Tensor,
    top_k_index_NK: Tensor,
    top_k_weights_NK: Tensor,
) -> Tensor:
    """All experts' weighted sum for this rank's tokens, [N, D], in the form transformers asks for.

    Args:
        experts: of this rank, on [tokens, D], [tokens, 1] and [tokens, 1].
    """
    top_k = top_k_index_NK.shape[1]
    expert_S, slot_S = torch.sort(top_k_index_NK.reshape(-1), stable=True)
    counts = torch.bincount(expert_S // num_local, minlength=dist.get_world_size(group))
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts, group=group)
    sent, received = counts.tolist(), arriving.tolist()
    expert_R = expert_S.new_empty(sum(received))
    dist.all_to_all_single(expert_R, expert_S, received, sent, group=group)
    travelling_SD = _compute_type(hidden_ND)[slot_S // top_k]
    arrived_RD: Tensor = all_to_all_single(travelling_SD, received, sent, group)
    result_RD = _with_one_more(experts, arrived_RD, expert_R % num_local)
    returned_SD: Tensor = all_to_all_single(result_RD, sent, received, group)
    by_slot = torch.empty_like(returned_SD).index_copy(0, slot_S, returned_SD)
    by_token_NKD = by_slot.view(-1, top_k, by_slot.shape[1])
    return (by_token_NKD * top_k_weights_NK[:, :, None]).sum(dim=1).to(hidden_ND.dtype)


def _with_one_more(experts: Experts, x_RD: Tensor, expert_R: Tensor) -> Tensor:
    """The experts' output [R, D], with an empty row that is dropped again.

    Where nothing arrives (R = 0), the row keeps the way back open: without it this rank would miss
    the others' exchange in the backward pass, and its experts would have no gradient.
    """
    x = torch.cat([x_RD, x_RD.new_zeros(1, x_RD.shape[1])])
    expert = torch.cat([expert_R, expert_R.new_zeros(1)])[:, None]
    return experts(x, expert, torch.ones_like(expert, dtype=x.dtype))[:-1]


def _compute_type(x: Tensor) -> Tensor:
    """In the type of the products: under autocast half as much travels."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
