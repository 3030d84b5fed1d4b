"""The policy losses on hand-computed cases, and their independence of the split."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.rl.losses import (
    BatchSize,
    ClipRange,
    LossInputError,
    PolicyTokens,
    dapo_loss,
    group_advantages,
    gspo_loss,
    overlong_penalty,
)

WIDE = ClipRange(0.20, 0.28)


def tokens_from_ratios(
    ratios: list[list[float]], advantages: list[float], old: float = -1.0
) -> PolicyTokens:
    """One response per inner list; each number is the ratio new/old of one token."""
    flat = [math.log(r) + old for row in ratios for r in row]
    return PolicyTokens(
        logprobs_N=torch.tensor(flat, dtype=torch.float64, requires_grad=True),
        old_logprobs_N=torch.full((len(flat),), old, dtype=torch.float64),
        sequence_N=torch.tensor([s for s, row in enumerate(ratios) for _ in row]),
        advantages_S=torch.tensor(advantages, dtype=torch.float64),
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, 0),  # on policy: plain policy gradient
        (1.2, 1.0, -1.2, -1.2, 0),  # inside
        (1.5, 1.0, -1.28, 0.0, 1),  # a good token grew past 1 + 0.28: no more push
        (0.5, 1.0, -0.5, -0.5, 0),  # a good token shrank: pull it back, unclipped
        (0.5, -1.0, 0.8, 0.0, 1),  # a bad token shrank past 1 - 0.20: enough
        (1.5, -1.0, 1.5, 1.5, 0),  # a bad token grew: push it down, unclipped
    ],
)
def test_dapo_clips_asymmetrically(
    ratio: float, advantage: float, loss: float, gradient: float, clipped: int
) -> None:
    tokens = tokens_from_ratios([[ratio]], [advantage])
    out = dapo_loss(tokens, BatchSize(1, 1), WIDE)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(loss)
    assert tokens.logprobs_N.grad.item() == pytest.approx(gradient)  # d(-rA)/dlogp = -rA
    assert (out.num_clipped, out.num_ratios) == (clipped, 1)


def test_dapo_weighs_every_token_the_same() -> None:
    # one token with A=1 and three with A=-1, ratio 1: -(1 - 3) / 4, not -(1 - 1) / 2
    tokens = tokens_from_ratios([[1.0], [1.0, 1.0, 1.0]], [1.0, -1.0])
    assert dapo_loss(tokens, BatchSize(4, 2), WIDE).loss.item() == pytest.approx(0.5)


def test_gspo_ratio_is_the_length_normalised_sequence_likelihood() -> None:
    # mean log ratio of (1.1, 1.3) = log sqrt(1.43); second response: (0.9, 0.9, 0.9) -> 0.9
    tokens = tokens_from_ratios([[1.1, 1.3], [0.9, 0.9, 0.9]], [1.0, -1.0])
    out = gspo_loss(tokens, BatchSize(5, 2), ClipRange(0.5, 0.5))
    assert out.loss.item() == pytest.approx(-(math.sqrt(1.43) - 0.9) / 2)
    out.loss.backward()
    # d/dlogp_t = -A * s / (length * S): spread evenly over the response's tokens
    expected = [-math.sqrt(1.43) / 4] * 2 + [0.9 / 6] * 3
    assert tokens.logprobs_N.grad.tolist() == pytest.approx(expected)


def test_gspo_clips_whole_responses_in_its_own_range() -> None:
    tokens = tokens_from_ratios([[1.001, 1.001], [1.0001, 1.0001]], [1.0, 1.0])
    out = gspo_loss(tokens, BatchSize(4, 2))
    out.loss.backward()
    assert (out.num_clipped, out.num_ratios) == (1, 2)
    assert out.loss.item() == pytest.approx(-(1.0004 + 1.0001) / 2)
    assert tokens.logprobs_N.grad[:2].tolist() == [0.0, 0.0]
    # DAPO's range would let both through
    assert dapo_loss(tokens, BatchSize(4, 2)).num_clipped == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 9), st.booleans())
def test_gradient_is_the_same_for_every_split(seed: int, num_sequences: int, gspo: bool) -> None:
    """Sum of shard gradients == gradient of the batch, for any split into shards."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (num_sequences,), generator=generator)
    sequence = torch.repeat_interleave(torch.arange(num_sequences), lengths)
    features = torch.randn(len(sequence), 5, generator=generator)
    old = -torch.rand(len(sequence), generator=generator)
    advantages = torch.randn(num_sequences, generator=generator)
    size = BatchSize(len(sequence), num_sequences)
    loss_of = gspo_loss if gspo else dapo_loss

    def gradient(shard_of: torch.Tensor) -> torch.Tensor:
        weight = torch.full((5,), 0.1, requires_grad=True)
        for shard in shard_of.unique():
            members = torch.nonzero(shard_of == shard).flatten()
            here = torch.isin(sequence, members)
            local = torch.searchsorted(members, sequence[here])
            logprobs = torch.nn.functional.logsigmoid(features[here] @ weight)
            loss_of(
                PolicyTokens(logprobs, old[here], local, advantages[members]), size
            ).loss.backward()
        return weight.grad

    whole = gradient(torch.zeros(num_sequences))
    split = gradient(torch.randint(0, num_sequences, (num_sequences,), generator=generator))
    alone = gradient(torch.arange(num_sequences))
    torch.testing.assert_close(split, whole, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(alone, whole, atol=1e-6, rtol=1e-6)


def test_group_advantages_by_hand() -> None:
    result = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.9, 0.0, 0.0, 0.0]]))
    assert result.advantages_GK[0].tolist() == pytest.approx([1, -1, -1, 1], abs=1e-5)
    root3 = math.sqrt(3)
    expected = [root3, -1 / root3, -1 / root3, -1 / root3]
    assert result.advantages_GK[1].tolist() == pytest.approx(expected, abs=1e-5)


def test_zero_variance_groups_are_dropped_only_when_asked() -> None:
    rewards = torch.tensor([[0.9, 0.9, 0.9], [0.1, 0.9, 0.9], [0.0, 0.0, 0.0]])
    dropped = group_advantages(rewards, dynamic_sampling=True)
    assert dropped.keep_G.tolist() == [False, True, False]
    kept = group_advantages(rewards, dynamic_sampling=False)
    assert kept.keep_G.tolist() == [True, True, True]
    assert kept.advantages_GK[0].tolist() == [0.0, 0.0, 0.0]
    # 0.9 has no exact float: rounding noise must not pass for a difference
    assert not group_advantages(torch.full((1, 5), 0.9) + 1e-8).keep_G.any()


def test_overlong_penalty_ramp() -> None:
    ramp = [overlong_penalty(n, max_length=48, buffer=8) for n in (10, 40, 42, 44, 48, 60)]
    assert ramp == pytest.approx([0.0, 0.0, -0.25, -0.5, -1.0, -1.0])
    assert overlong_penalty(48, max_length=48, buffer=0) == 0.0


@pytest.mark.parametrize(
    ("call", "culprit"),
    [
        (lambda: BatchSize(0, 0), "empty mini-batch"),
        (lambda: ClipRange(0.0, 0.2), "clip range"),
        (lambda: group_advantages(torch.zeros(3, 1)), "rollouts_per_prompt"),
        (lambda: overlong_penalty(3, 8, 8), "overlong buffer 8"),
        (
            lambda: PolicyTokens(
                torch.zeros(2), torch.zeros(3), torch.zeros(2).long(), torch.ones(1)
            ),
            "old_logprobs_N",
        ),
        (
            lambda: PolicyTokens(
                torch.zeros(2), torch.zeros(2), torch.tensor([0, 4]), torch.ones(1)
            ),
            "response 4",
        ),
        (
            lambda: gspo_loss(
                PolicyTokens(torch.zeros(2), torch.zeros(2), torch.zeros(2).long(), torch.ones(2)),
                BatchSize(2, 2),
            ),
            "without tokens",
        ),
    ],
)
def test_bad_input_is_named(call, culprit: str) -> None:
    with pytest.raises(LossInputError, match=culprit):
        call()
