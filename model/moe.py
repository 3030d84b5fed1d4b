"""Mixture of experts: the losses on the routers and their health.

Shape suffixes: L expert layers, E experts, N tokens of a batch in row-major order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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


def router_z_loss(
    router_logits: Sequence[torch.Tensor],
    token_mask_N: torch.Tensor | None = None,
    coefficient: float = 0.001,
    all_reduce: bool = False,
) -> torch.Tensor:
    """Router z-loss, mean over layers and tokens of logsumexp(logits)^2, times the coefficient.

    It keeps the logits small, whose rounding in bfloat16 would otherwise change the choice of
    experts (ST-MoE, arXiv 2202.08906, equation 5). The paper names none. Padding is left out.

    With `all_reduce`, the number of tokens is summed over all ranks, so that the mean of this loss
    over ranks is the loss of the joint batch, as in `balance_loss`.

    Args:
        router_logits: one [N, E] tensor per layer.
        token_mask_N: [N] bool, False for padding.
        coefficient: ST-MoE used 0.001.
        all_reduce: count tokens over the default process group, when there is one.

    Returns:
        scalar, ready to be added to the token loss.
    """
    squared = [torch.logsumexp(x.float(), dim=-1).square() for x in router_logits]
    num_tokens = squared[0].new_tensor(squared[0].numel())
    if token_mask_N is not None:
        squared = [torch.where(token_mask_N, x, 0.0) for x in squared]
        num_tokens = token_mask_N.sum().float()
    num_ranks = 1
    if all_reduce and dist.is_available() and dist.is_initialized():
        dist.all_reduce(num_tokens)
        num_ranks = dist.get_world_size()
    total_L = torch.stack([x.sum() for x in squared])
    return coefficient * (total_L * (num_ranks / num_tokens.clamp_min(1.0))).mean()


@dataclass(frozen=True, slots=True)
class RouterHealth:
    """How evenly experts are used, one number per expert layer.

    Attributes:
        entropy: Shannon entropy of the shares of token slots, over log E: 1 is uniform, 0 is one
            expert for everything (our choice, the paper names no formula).
        load_max_over_mean: slots of the busiest expert over the mean: 1 is uniform, E the worst.
        num_dead: experts that got no slot at all.
        num_tokens: tokens that were routed, padding left out.
    """

    entropy: tuple[float, ...]
    load_max_over_mean: tuple[float, ...]
    num_dead: tuple[int, ...]
    num_tokens: int

    def summary(self) -> dict[str, float]:
        """Means over layers of entropy and load, the sum of dead experts."""
        layers = max(1, len(self.entropy))
        return {
            "router_entropy": sum(self.entropy) / layers,
            "router_load_max_over_mean": sum(self.load_max_over_mean) / layers,
            "router_dead_experts": float(sum(self.num_dead)),
        }


class RouterMeter:
    """Counts slots over batches.

    Args:
        top_k: experts per token.
    """

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k
        self._slots_LE: torch.Tensor | None = None

    @torch.no_grad()
    def add(
        self, router_logits: Sequence[torch.Tensor], token_mask_N: torch.Tensor | None = None
    ) -> None:
        """Count a batch: one [N, E] tensor per layer, [N] bool with False for padding."""
        counts = [count_slots(x, self.top_k, token_mask_N).double() for x in router_logits]
        slots_LE = torch.stack(counts)  # double: float32 stops counting at 16.8M
        self._slots_LE = slots_LE if self._slots_LE is None else self._slots_LE + slots_LE

    def health(self) -> RouterHealth:
        """The health of everything counted.

        Raises:
            ValueError: nothing was counted.
        """
        if self._slots_LE is None or not bool(self._slots_LE.sum() > 0):
            raise ValueError("no routed token was counted; add() a batch of an expert model first")
        slots_LE = self._slots_LE
        share_LE = slots_LE / slots_LE.sum(dim=1, keepdim=True)
        entropy_L = torch.special.entr(share_LE).sum(dim=1) / math.log(slots_LE.shape[1])
        load_L = share_LE.amax(dim=1) * slots_LE.shape[1]
        return RouterHealth(
            entropy=tuple(entropy_L.tolist()),
            load_max_over_mean=tuple(load_L.tolist()),
            num_dead=tuple((slots_LE == 0).sum(dim=1).tolist()),
            num_tokens=round(float(slots_LE[0].sum()) / self.top_k),
        )
