"""The policy on a real network: packed log-probabilities, splits, updates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from model.modeling import SailVLForConditionalGeneration
from model.processor import Encoded, SailVLProcessor
from sailyard.recipe import RLRecipe
from tests.training.rl_toy import IMAGE_SIZE, THINGS, build_policy, question
from training.rl.policy import MiniBatch, Policy, Response, UpdateStats

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def dense() -> tuple[SailVLForConditionalGeneration, SailVLProcessor]:
    return build_policy()


def recipe(**changes: object) -> RLRecipe:
    settings: dict[str, object] = {
        "dtype": "float32",
        "seq_len": 256,
        "max_new_tokens": 8,
        "lr": 1e-3,
        "clip_norm": 1e9,
        "threads": 1,
    }
    return RLRecipe(**{**settings, **changes})


def make_groups(processor: SailVLProcessor, seed: int = 0) -> list[list[Response]]:
    """Four prompts (two with an image) and three random replies each, of 1 to 6 tokens."""
    rng = np.random.default_rng(seed)
    groups = []
    for number in range(4):
        images, text = [], question(THINGS[number])
        if number % 2:
            pixels = rng.integers(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
            images, text = [Image.fromarray(pixels)], f"<image>\n{text}"
        head = processor.encode(
            [{"role": "user", "content": text}], images, add_generation_prompt=True
        )
        advantages = rng.normal(size=3)
        group = []
        for advantage in advantages - advantages.mean():
            reply = rng.integers(0, 250, int(rng.integers(1, 7)))
            ids = np.concatenate([head.input_ids, reply])
            mask = np.arange(len(ids)) >= len(head.input_ids)
            group.append(Response(Encoded(ids, mask, head.pixel_values), float(advantage)))
        groups.append(group)
    return groups


def gradient(policy: Policy, responses: list[Response]) -> torch.Tensor:
    policy.model.zero_grad(set_to_none=True)
    batch = MiniBatch(responses, policy.recipe, policy.world)
    policy.remember(batch)
    assert batch.old_logprobs is not None
    # Ratios of 1.35, as after a few updates: terms with a positive advantage are clipped.
    batch.old_logprobs = [old - 0.3 for old in batch.old_logprobs]
    policy.accumulate(batch, UpdateStats())
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("algorithm", ["dapo", "gspo"])
def test_gradient_is_the_same_for_every_packing_and_micro_batch(
    dense: tuple[SailVLForConditionalGeneration, SailVLProcessor], algorithm: str
) -> None:
    """Rows of another length, micro-batches of another size: the same gradient to 1e-6."""
    model, processor = dense
    responses = [r for group in make_groups(processor) for r in group]
    expected = gradient(Policy(model, recipe(algorithm=algorithm, micro_batch_size=64)), responses)
    assert float(expected.norm()) > 1e-3
    for seq_len, micro in [(256, 1), (64, 1), (64, 3), (48, 2)]:
        split = recipe(algorithm=algorithm, seq_len=seq_len, micro_batch_size=micro)
        found = gradient(Policy(model, split), responses)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_packed_logprobs_equal_each_reply_alone(
    dense: tuple[SailVLForConditionalGeneration, SailVLProcessor],
) -> None:
    model, processor = dense
    policy = Policy(model, recipe(temperature=0.7))
    responses = [r for group in make_groups(processor) for r in group]
    with torch.no_grad():
        packed = policy.logprobs([responses[:5], responses[5:]])
        alone = torch.cat([policy.logprobs([[response]]) for response in responses])
        one = responses[0].encoded
        logits = model(input_ids=torch.from_numpy(one.input_ids)[None], pixel_values=None).logits
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    first = int(np.argmax(one.loss_mask))
    by_hand = torch.log_softmax(logits[0, first - 1] / 0.7, -1)[int(one.input_ids[first])]
    assert packed[0].item() == pytest.approx(by_hand.item(), abs=1e-5)


def test_updates_follow_the_advantages_and_start_on_policy() -> None:
    model, processor = build_policy()
    policy = Policy(model, recipe(updates_per_step=1, lr=1e-3))
    groups = make_groups(processor)
    flat = [r for group in groups for r in group]

    def weighted() -> float:
        with torch.no_grad():
            sums = [float(policy.logprobs([[r]]).sum()) for r in flat]
        return sum(r.advantage * s for r, s in zip(flat, sums, strict=True))

    before = weighted()
    stats = policy.improve(groups, 1e-3, np.random.default_rng(0))
    assert weighted() > before
    assert stats.num_updates == 1
    metrics = stats.metrics()
    assert metrics["clip_fraction"] == 0.0  # one update: every ratio is still 1
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-9)


def test_later_updates_of_a_step_are_off_policy() -> None:
    model, processor = build_policy()
    policy = Policy(model, recipe(updates_per_step=4))
    stats = policy.improve(make_groups(processor), 1e-2, np.random.default_rng(0))
    assert stats.num_updates == 4
    assert stats.metrics()["kl"] > 1e-4
    assert stats.metrics()["clip_fraction"] > 0.0


def test_nothing_to_learn_changes_nothing(
    dense: tuple[SailVLForConditionalGeneration, SailVLProcessor],
) -> None:
    model, _ = dense
    before = [p.detach().clone() for p in model.parameters()]
    stats = Policy(model, recipe()).improve([], 1e-3, np.random.default_rng(0))
    assert (stats.num_updates, stats.metrics()) == (0, {})
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_auto_picks_the_algorithm_by_the_network(
    dense: tuple[SailVLForConditionalGeneration, SailVLProcessor],
) -> None:
    assert Policy(dense[0], recipe(algorithm="auto")).algorithm == "dapo"
    assert Policy(dense[0], recipe(algorithm="gspo")).algorithm == "gspo"
    experts, processor = build_policy(moe=True)
    policy = Policy(experts, recipe(clip_low=3e-4, clip_high=4e-4))
    assert policy.algorithm == "gspo"
    assert policy.improve(make_groups(processor), 1e-3, np.random.default_rng(0)).num_updates == 4


def test_only_the_trainable_parts_learn() -> None:
    model, processor = build_policy()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    policy = Policy(model, recipe(trainable=["language"]))
    policy.improve(make_groups(processor), 1e-2, np.random.default_rng(0))
    for name, parameter in model.named_parameters():
        changed = not torch.equal(before[name], parameter)
        assert changed == name.startswith("language_model."), name


def test_a_broken_gradient_leaves_the_weights_alone() -> None:
    model, processor = build_policy()
    groups = make_groups(processor)
    groups[0][0] = Response(groups[0][0].encoded, float("inf"))
    before = [p.detach().clone() for p in model.parameters()]
    policy = Policy(model, recipe(updates_per_step=1))
    assert not policy.improve(groups, 1e-3, np.random.default_rng(0)).finite
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
