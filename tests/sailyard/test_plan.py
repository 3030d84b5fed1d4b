"""``sailyard plan``: the pipeline's tokens, layouts that fit, advice, refusals, a stable schema."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner, Result

from model.counting import count_recipe
from sailyard.cli import commands
from sailyard.plan.hardware import Gpu, find_gpu
from sailyard.plan.memory import Layout, memory_of
from sailyard.plan.network import Learning, Network
from sailyard.plan.planner import Options, make_plan
from sailyard.plan.work import Assumptions, token_flops
from sailyard.recipe import load_recipe

SCHEMA = {
    "recipe", "gpus", "gpu", "parameters", "stages", "totals", "paper", "not_planned",
    "assumptions",
}  # fmt: skip
STAGE_SCHEMA = {
    "stage", "trainable", "tokens", "tokens_basis", "assumed", "rollout_tokens", "in_paper",
    "steps", "flops", "recompute_flops", "rollout_flops", "layout", "recipe_layout",
    "busy_share", "memory", "fits",
    "would_fit", "days", "gpu_hours", "cost", "checkpoint_bytes", "checkpoints",
    "checkpoint_traffic_bytes", "checkpoint_storage_bytes", "data_bytes",
}  # fmt: skip
MEMORY_SCHEMA = {
    "weights", "copies", "gradients", "optimizer", "activations", "logits", "gathered",
    "host", "total",
    "activations_without_checkpointing", "activations_with_checkpointing",
}  # fmt: skip


def plan(recipe: str, gpus: int = 64, gpu: str | Gpu = "h100", **options):
    loaded = load_recipe(recipe)
    chosen = find_gpu(gpu) if isinstance(gpu, str) else gpu
    return make_plan(loaded, count_recipe(loaded.model), Options(gpus, chosen, **options))


def by_name(found):
    return {stage["stage"]: stage for stage in found["stages"]}


def call(*arguments: str) -> Result:
    return CliRunner().invoke(commands, ["plan", *arguments])


def test_tokens_come_to_the_papers():
    """Paper: 776B tokens in all; its tables' stages within 5 % each, alignment's three together."""
    found = plan("8b")["paper"]
    assert found["tokens"] == pytest.approx(776e9, rel=0.01)
    for stage in found["stages"]:
        if not stage["stage"].endswith("_rl"):  # the paper does not say what it counts there
            assert stage["tokens"] == pytest.approx(stage["paper_tokens"], rel=0.05)
    # The arm at a fixed rate and the soup's second ingredient are ours.
    assert found["beyond_paper_tokens"] == pytest.approx(198e9, rel=0.01)


def test_totals_are_the_sums_of_stages():
    found = plan("a3b", price=3.0)
    for key in ("tokens", "flops", "gpu_hours", "cost", "checkpoint_traffic_bytes"):
        assert found["totals"][key] == pytest.approx(sum(s[key] for s in found["stages"]))
    for stage in found["stages"]:
        assert stage["gpu_hours"] == pytest.approx(stage["days"] * 24 * 64)
        assert stage["cost"] == pytest.approx(3.0 * stage["gpu_hours"])


def test_days_follow_from_flops_and_utilisation():
    slow, fast = (by_name(plan("8b", mfu=mfu))["pretraining.multitask"] for mfu in (0.2, 0.4))
    work = slow["flops"] + slow["recompute_flops"]
    assert slow["days"] == pytest.approx(work / (64 * 989.4e12 * 0.2) / 86_400)
    assert slow["days"] == pytest.approx(2 * fast["days"])


def test_ranks_without_a_row_are_paid_for():
    some, many = (by_name(plan("8b", gpus=g))["alignment.world_knowledge"] for g in (512, 1024))
    assert (some["busy_share"], many["busy_share"]) == (1.0, 0.5)
    assert many["gpu_hours"] == pytest.approx(2 * some["gpu_hours"])


def test_every_stage_is_planned_or_says_why_not():
    from sailyard.pipeline import build_pipeline

    for recipe in ("tiny-moe", "a3b", "2b-anyres"):
        found = plan(recipe)
        planned, left_out = set(by_name(found)), set(found["not_planned"])
        assert not planned & left_out
        names = {stage.name for stage in build_pipeline(load_recipe(recipe)).stages}
        assert planned | left_out == names
        assert all(found["not_planned"].values())


def test_frozen_parts_have_neither_gradient_nor_optimizer():
    stages = by_name(plan("8b", parallel="zero1"))
    adapter = 41_963_520
    assert stages["alignment.warmup"]["trainable"] == ["adapter"]
    assert stages["alignment.warmup"]["memory"]["gradients"] == 6 * adapter
    assert stages["alignment.warmup"]["memory"]["optimizer"] == 12 * adapter / 64


def test_a_smaller_gpu_gets_a_leaner_layout_and_advice_when_told_not_to():
    roomy = by_name(plan("2b", gpu="h200"))["pretraining.multitask"]
    tight = by_name(plan("2b", gpu="a100-40"))["pretraining.multitask"]
    assert not roomy["layout"]["checkpointing"]
    assert tight["layout"]["checkpointing"]
    assert tight["fits"]
    told = by_name(plan("2b", gpu="a100-40", checkpointing=False))["pretraining.multitask"]
    assert not told["fits"]
    assert told["would_fit"]["checkpointing"]
    assert told["would_fit"]["parallel"] == told["layout"]["parallel"]  # nothing else changes
    assert told["would_fit"]["total"] <= find_gpu("a100-40").usable_bytes


def test_the_recipes_own_layout_is_held_against_the_gpu():
    stage = by_name(plan("8b"))["pretraining.multitask"]
    assert stage["fits"]
    assert stage["recipe_layout"]["words"] == "ZeRO-2 + activation checkpointing"
    assert stage["recipe_layout"]["fits"]
    # Thoughts are trained in longer rows.
    small = by_name(plan("8b", gpu="a100-40"))["post_training.longcot_sft"]
    assert not small["recipe_layout"]["fits"]
    alone = by_name(plan("2b", gpus=1, gpu="h200"))["alignment.warmup"]["recipe_layout"]
    # One rank is plain torch.
    assert (alone["words"], alone["fits"]) == ("plain + activation checkpointing", True)


def test_more_gpus_when_nothing_else_helps():
    found = by_name(plan("a3b", gpus=1))["pretraining.multitask"]
    network = Network(load_recipe("a3b").model, count_recipe(load_recipe("a3b").model))
    change = found["would_fit"]
    assert not found["fits"]
    assert change["gpus"] > 1
    keys = Layout.__dataclass_fields__
    layout = Layout(**{key: change[key] for key in keys})
    memory = memory_of(network, Learning.of(["vision", "adapter", "language"]), layout, 8192)
    assert memory.total == change["total"] <= find_gpu("h100").usable_bytes


def test_nothing_helps_on_a_gpu_without_memory():
    found = by_name(plan("8b", gpu=Gpu("toy", 10**9, 1e12)))["pretraining.multitask"]
    assert not found["fits"]
    assert found["would_fit"] is None


def test_experts_cost_what_a_token_visits():
    section = load_recipe("a3b").model
    network = Network(section, count_recipe(section))
    learning = Learning(frozenset({"language"}), uses_vision=False)
    per_token = token_flops(network, learning, network.flop_model(), 2000, Assumptions())[0]
    assert per_token == pytest.approx(6 * network.counted.active_without_embeddings, rel=0.2)
    assert per_token < 6 * network.counted.language / 5
    frozen = Learning(frozenset({"language"}), routers_only=True, uses_vision=False)
    calibrated = token_flops(network, frozen, network.flop_model(), 2000, Assumptions())[0]
    assert calibrated < per_token  # no gradient of any matrix but the routers'


def test_rollouts_take_their_share_of_the_time():
    stages = [by_name(plan("8b", rollout_share=s))["post_training.mixed_rl"] for s in (0.0, 0.8)]
    assert stages[1]["days"] == pytest.approx(5 * stages[0]["days"])
    assert stages[1]["rollout_tokens"] == 244 * 410 * 5 * 1000
    assert stages[1]["rollout_flops"] > 0


def test_images_at_their_own_size_cost_more_where_they_are_larger_than_a_tile():
    tiles, native = (by_name(plan(r))["pretraining.basic"]["flops"] for r in ("2b", "2b-anyres"))
    assert native > tiles


def test_json_keeps_its_schema():
    result = call("--recipe", "a3b", "--gpus", "64", "--gpu", "h100", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found) == SCHEMA
    for stage in found["stages"]:
        assert set(stage) == STAGE_SCHEMA
        assert set(stage["memory"]) == MEMORY_SCHEMA


def test_table_names_assumptions_and_what_is_left_out():
    text = call("--recipe", "2b", "--gpus", "8", "--set", "alignment.warmup.max_steps=7").stdout
    for words in ("MFU 0.3", "$2.5", "evaluation.suite", "776.0B", "2,000 tokens per sample"):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h10"], "did you mean h100"),
        (["--gpu", "abacus"], "use one of a100, a100-40, h20"),
        (["--gpus", "0"], "--gpus is 0"),
        (["--mfu", "1.2"], "--mfu is 1.2"),
        (["--price", "-1"], "--price is -1"),
        (["--rollout-share", "1"], "--rollout-share is 1"),
        (["--parallel", "ddp", "--offload"], "--offload needs --parallel zero1, zero2 or zero3"),
        (["--expert-parallel", "4"], "no experts"),
        (["--recipe", "9b"], "no recipe named '9b'"),
    ],
)
def test_refusals_name_the_option(arguments, words):
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        CliRunner().invoke(commands, ["plan", *arguments], catch_exceptions=False)


def test_planning_modules_import_no_torch():
    code = (
        "import sys, sailyard.plan.planner, sailyard.cli.planning; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
