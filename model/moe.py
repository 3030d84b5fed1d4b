"""Mixture of experts: balance loss, router health."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def count_slots(
    logits_NE: torch.Tensor, top_k: int, token_mask_N: torch.Tensor | None = None
) -> torch.Tensor:
    """How many of the tokens' top-k slots went to each expert: [E] float32, padding left out."""
    chosen = logits_NE.topk(top_k, dim=-1).indices
    weight = logits_NE.new_ones(chosen.shape[0], dtype=torch.float32)
    if token_mask_N is not None:
        weight = token_mask_N.to(torch.float32)
    counts = torch.zeros(logits_NE.shape[-1], dtype=torch.float32, device=logits_NE.device)
    return counts.scatter_add_(0, chosen.reshape(-1), weight.repeat_interleave(top_k))


def balance_loss(
    router_logits: Sequence[torch.Tensor],
    top_k: int,
    token_mask_N: torch.Tensor | None = None,
    coefficient: float = 0.001,
    all_reduce: bool = False,
) -> torch.Tensor:
    """Load-balancing loss, mean over layers of E * sum_e f_e P_e, times the coefficient.

    f_e is the share of slots that went to expert e (1/k is in it, so the f_e sum to 1), P_e the
    mean router probability. Both leave padding out. Uniform routing gives the coefficient itself,
    all slots on one expert give up to E times as much.

    With `all_reduce`, f_e and the number of tokens are summed over all ranks before use (paper
    section 2.2: activation statistics averaged across ranks). Then the mean of this loss over
    ranks, which is what data-parallel training descends, is the loss of the joint batch.

    Args:
        router_logits: one [N, E] tensor per layer, N = tokens of the batch in row-major order.
        top_k: experts per token.
        token_mask_N: [N] bool, False for padding.
        coefficient: Qwen3's `router_aux_loss_coef`; the paper gives none.
        all_reduce: sum the statistics over the default process group, when there is one.

    Returns:
        scalar, ready to be added to the token loss.
    """
    probs = [torch.softmax(logits.float(), dim=-1) for logits in router_logits]
    if token_mask_N is not None:
        probs = [torch.where(token_mask_N[:, None], prob, 0.0) for prob in probs]
    prob_LE = torch.stack([prob.sum(dim=0) for prob in probs])
    with torch.no_grad():
        slots_LE = torch.stack([count_slots(x, top_k, token_mask_N) for x in router_logits])
        num_ranks = 1
        if all_reduce and dist.is_available() and dist.is_initialized():
            dist.all_reduce(slots_LE)
            num_ranks = dist.get_world_size()
        num_tokens = (slots_LE[0].sum() / top_k).clamp_min(1.0)
        share_LE = slots_LE / (num_tokens * top_k)
    num_experts = prob_LE.shape[1]
    mean_LE = prob_LE * (num_ranks / num_tokens)
    return coefficient * num_experts * (share_LE * mean_LE).sum(dim=1).mean()
