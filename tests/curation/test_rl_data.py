"""The stages that ask a policy, run on a real (random, tiny) network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from curation import mixed_rl_data, rl_data, think_fusion
from curation.policy import Asked
from model.chat import THINKING_SUFFIX
from model.generation import Completion
from sailyard.samples import SampleReader
from sailyard.stage import local_context
from tests.evaluation.tiny import micro_recipe, pool, save_tiny, write

SKILLS = ("sum", "colour")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("policy")
    return {
        "checkpoint": save_tiny(root / "checkpoint"),
        "rl_pool": write(root / "pool", pool(8, skills=SKILLS)),
        "instruction": write(root / "instruction", pool(20, seed=4, skills=("shape",))),
    }


def asked(rate: float) -> Asked:
    right = [index < rate * 4 for index in range(4)]
    return Asked(0, pool(1, skills=("sum",))[0], [Completion("", [1], [0.0], True)] * 4, right)


def test_poorly_solved_prompts_come_first() -> None:
    rates = [asked(rate) for rate in (0.75, 0.0, 0.5, 0.25)]
    ordered = sorted(rates, key=mixed_rl_data.hardness)
    assert [item.pass_rate for item in ordered] == [0.25, 0.5, 0.75, 0.0]


@pytest.mark.slow
def test_rl_data_keeps_what_an_ignorant_policy_could_learn(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    """A random policy solves nothing: reasoning prompts go, perception prompts stay."""
    recipe = micro_recipe("curation.rl_data.num_prompts=5")
    chosen = {name: inputs[name] for name in ("checkpoint", "rl_pool")}
    ctx = local_context(tmp_path, recipe, "curation.rl_data", chosen)
    rl_data.run(ctx)
    prompts = list(SampleReader(ctx.output("prompts")))
    assert len(prompts) == 5
    assert {prompt.task for prompt in prompts} == {"colour"}
    assert all(prompt.messages[-1]["role"] == "user" for prompt in prompts)
    assert all(prompt.meta["pass_rate"] < 1.0 for prompt in prompts)
    figures = ctx.summary_values
    assert figures["examined"] == figures["kept"] + figures["never_right"] + figures["always_right"]
    assert figures["examined"] <= 16


@pytest.mark.slow
def test_a_policy_that_cannot_think_gives_direct_items_only(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    recipe = micro_recipe("curation.think_fusion.num_samples=12")
    chosen = {
        "checkpoint": inputs["checkpoint"],
        "prompts": inputs["rl_pool"],
        "instruction": inputs["instruction"],
    }
    ctx = local_context(tmp_path, recipe, "curation.think_fusion", chosen)
    think_fusion.run(ctx)
    items = list(SampleReader(ctx.output("fusion")))
    assert len(items) == 11
    assert all(item.meta["think"] is False for item in items)
    assert not any(THINKING_SUFFIX in item.messages[0]["content"] for item in items)
    assert ctx.summary_values["cot_fraction"] == 0.0
    assert ctx.summary_values["prompts_tried"] == 8


@pytest.mark.slow
def test_mixed_prompts_are_hard_and_general(inputs: dict[str, Path], tmp_path: Path) -> None:
    recipe = micro_recipe("curation.mixed_rl_data.num_prompts=6")
    chosen = {name: inputs[name] for name in ("checkpoint", "rl_pool")}
    ctx = local_context(tmp_path, recipe, "curation.mixed_rl_data", chosen)
    mixed_rl_data.run(ctx)
    prompts = list(SampleReader(ctx.output("prompts")))
    hard = [prompt for prompt in prompts if prompt.meta["think"]]
    assert len(hard) == 3
    assert len(prompts) == 6
    assert all(prompt.messages[-1]["content"].endswith(THINKING_SUFFIX) for prompt in hard)
