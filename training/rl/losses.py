"""Policy-gradient losses: DAPO (token level) and GSPO (sequence level).

Shape legend: N response tokens and S responses of one shard (a micro-batch of packed rows),
G prompts (groups), K rollouts per prompt.

A loss is a *sum over the shard divided by the size of the whole mini-batch*, never a mean over
the shard. Adding the gradients of all shards therefore gives the gradient of the mini-batch
whatever the split; dividing per shard is how other trainers came to scale it by 0.5 to 4.
A response must lie in one shard entirely, which packing guarantees.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ZERO_SPREAD = 1e-6
"""A group whose rewards differ by less teaches nothing (our choice; rewards are in [-1, 1])."""
ADVANTAGE_EPSILON = 1e-6
"""Added to the standard deviation of a group (our choice)."""


class LossInputError(ValueError):
    """The tensors given to a loss do not describe one shard."""


@dataclass(frozen=True, slots=True)
class ClipRange:
    """Bounds of the probability ratio: [1 - low, 1 + high]."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0.0 < self.low < 1.0 or self.high <= 0.0:
            raise LossInputError(
                f"clip range [{self.low}, {self.high}]: give 0 < low < 1 and high > 0"
            )


DAPO_CLIP = ClipRange(0.20, 0.28)
"""Paper section 4.2.3 gives [0.20, 0.28]; read as DAPO's asymmetric bounds."""
GSPO_CLIP = ClipRange(3e-4, 4e-4)
"""GSPO's own publication. A length-normalised ratio moves far less than a token's, so DAPO's
bounds would never bind. SAIL-VL2 does not give a separate range for GSPO."""


@dataclass(frozen=True, slots=True)
class PolicyTokens:
    """The response tokens of one shard, flattened.

    logprobs_N: log-probability of each token under the policy being trained (with gradient).
    old_logprobs_N: the same under the policy that sampled it (no gradient).
    sequence_N: int64, which response of the shard (0..S-1) the token belongs to.
    advantages_S: float, one per response.
    """

    logprobs_N: Tensor
    old_logprobs_N: Tensor
    sequence_N: Tensor
    advantages_S: Tensor

    def __post_init__(self) -> None:
        shape = self.logprobs_N.shape
        for name in ("old_logprobs_N", "sequence_N"):
            if getattr(self, name).shape != shape or len(shape) != 1:
                raise LossInputError(
                    f"{name} has shape {tuple(getattr(self, name).shape)}, logprobs_N has "
                    f"{tuple(shape)}; all must be flat and equally long"
                )
        if self.sequence_N.numel() and int(self.sequence_N.max()) >= self.advantages_S.numel():
            raise LossInputError(
                f"sequence_N names response {int(self.sequence_N.max())} but there are only "
                f"{self.advantages_S.numel()} advantages"
            )


@dataclass(frozen=True, slots=True)
class BatchSize:
    """Size of the whole mini-batch over all its shards (and ranks): what a loss divides by."""

    num_tokens: int
    num_sequences: int

    def __post_init__(self) -> None:
        if self.num_tokens < 1 or self.num_sequences < 1:
            raise LossInputError("an empty mini-batch has no loss: skip the update instead")


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """A shard's part of the loss, and sums that add up over shards.

    loss: scalar with gradient. num_clipped: ratios (of tokens in DAPO, of responses in GSPO) at
    which the clip is active, i.e. without gradient. num_ratios: all ratios of the shard.
    kl_sum: sum over tokens of the k3 estimate of KL(old || new), in nats.
    """

    loss: Tensor
    num_clipped: int
    num_ratios: int
    kl_sum: float


def dapo_loss(tokens: PolicyTokens, size: BatchSize, clip: ClipRange = DAPO_CLIP) -> PolicyLoss:
    """Clipped surrogate per token, averaged over all tokens of the mini-batch, no KL term.

    Every token weighs the same, so a long response weighs more than a short one (DAPO). The
    upper bound is looser than the lower one, so that rare good tokens may grow.
    """
    log_ratio_N = tokens.logprobs_N - tokens.old_logprobs_N
    advantages_N = tokens.advantages_S.to(log_ratio_N.dtype)[tokens.sequence_N]
    objective_N, clipped_N = _clipped_objective(log_ratio_N.exp(), advantages_N, clip)
    return PolicyLoss(
        loss=-objective_N.sum() / size.num_tokens,
        num_clipped=int(clipped_N.sum()),
        num_ratios=objective_N.numel(),
        kl_sum=_kl_sum(log_ratio_N),
    )


def gspo_loss(tokens: PolicyTokens, size: BatchSize, clip: ClipRange = GSPO_CLIP) -> PolicyLoss:
    """Clipped surrogate per response, averaged over the responses of the mini-batch.

    The ratio is exp(mean over the response's tokens of log new - log old): the likelihood ratio
    of the whole response, normalised by its length. Experts that switch between two updates move
    single tokens a lot but their mean little, which is why the paper uses it for MoE.
    """
    log_ratio_N = tokens.logprobs_N - tokens.old_logprobs_N
    num_sequences = tokens.advantages_S.numel()
    lengths_S = torch.bincount(tokens.sequence_N, minlength=num_sequences)
    if bool((lengths_S == 0).any()):
        raise LossInputError("a response without tokens has no likelihood: drop it first")
    sum_S = log_ratio_N.new_zeros(num_sequences).index_add(0, tokens.sequence_N, log_ratio_N)
    ratio_S = (sum_S / lengths_S).exp()
    advantages_S = tokens.advantages_S.to(ratio_S.dtype)
    objective_S, clipped_S = _clipped_objective(ratio_S, advantages_S, clip)
    return PolicyLoss(
        loss=-objective_S.sum() / size.num_sequences,
        num_clipped=int(clipped_S.sum()),
        num_ratios=num_sequences,
        kl_sum=_kl_sum(log_ratio_N),
    )


def _clipped_objective(ratio: Tensor, advantage: Tensor, clip: ClipRange) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic surrogate and where its clip is active; both shaped like `ratio`."""
    clamped = ratio.clamp(1.0 - clip.low, 1.0 + clip.high)
    objective = torch.minimum(ratio * advantage, clamped * advantage)
    with torch.no_grad():
        grows = (advantage > 0) & (ratio > 1.0 + clip.high)
        shrinks = (advantage < 0) & (ratio < 1.0 - clip.low)
    return objective, grows | shrinks


def _kl_sum(log_ratio_N: Tensor) -> float:
    log_ratio_N = log_ratio_N.detach()
    return float((log_ratio_N.exp() - 1.0 - log_ratio_N).sum())


@dataclass(frozen=True, slots=True)
class GroupAdvantages:
    """advantages_GK: (reward - group mean) / (group deviation + epsilon), zero in dropped groups.
    keep_G: bool, the groups that take part in the update."""

    advantages_GK: Tensor
    keep_G: Tensor


def group_advantages(rewards_GK: Tensor, dynamic_sampling: bool = True) -> GroupAdvantages:
    """Advantages of K rollouts relative to their own prompt's group (no critic).

    `dynamic_sampling` drops the groups whose rewards are all equal. Their advantage is zero
    anyway, but kept they would still count in the loss's denominator and so shrink every other
    group's gradient as the policy gets better.
    """
    if rewards_GK.ndim != 2 or rewards_GK.shape[1] < 2:
        raise LossInputError(
            f"rewards have shape {tuple(rewards_GK.shape)}: a group needs at least 2 rollouts "
            "(rollouts_per_prompt)"
        )
    rewards_GK = rewards_GK.double()
    spread_G = rewards_GK.amax(dim=1) - rewards_GK.amin(dim=1)
    varied_G = spread_G > ZERO_SPREAD
    centred_GK = rewards_GK - rewards_GK.mean(dim=1, keepdim=True)
    deviation_G1 = rewards_GK.std(dim=1, correction=0, keepdim=True)
    advantages_GK = centred_GK / (deviation_G1 + ADVANTAGE_EPSILON)
    advantages_GK = torch.where(varied_G[:, None], advantages_GK, 0.0).float()
    keep_G = varied_G if dynamic_sampling else torch.ones_like(varied_G)
    return GroupAdvantages(advantages_GK, keep_G)


def overlong_penalty(length: int, max_length: int, buffer: int) -> float:
    """DAPO's soft punishment of long responses, in [-1, 0], added to the reward.

    0 up to `max_length - buffer` tokens, then falling linearly to -1 at `max_length`.
    A buffer of 0 switches it off (SAIL-VL2 is silent on over-long responses).
    """
    if not 0 <= buffer < max_length:
        raise LossInputError(
            f"overlong buffer {buffer} must lie in 0..{max_length - 1} (max_new_tokens - 1)"
        )
    if buffer == 0:
        return 0.0
    excess = length - (max_length - buffer)
    return -min(1.0, max(0.0, excess / buffer))
