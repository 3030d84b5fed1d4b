"""The planner's memory and FLOPs against what small networks really keep and compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import output_layer
from model.attention import BACKEND as SEGMENTS
from model.checkpoint import build_model
from model.config import language_config_of, vision_config_of
from model.counting import count_model, count_recipe
from model.experts import BACKEND as FUSED
from model.experts import OVERRIDE
from model.modeling import SailVLForConditionalGeneration, freeze_except
from sailyard.plan.memory import (
    LOGITS_AT_ONCE,
    PARALLEL,
    Layout,
    activations,
    copied,
    memory_of,
)
from sailyard.plan.network import PARTS, Learning, Network
from sailyard.plan.work import Assumptions, token_flops
from sailyard.recipe import load_recipe
from training.engine import Engine

TOKENS = 256
IMAGE_TOKEN = 5
STAGES = [["adapter"], ["vision", "adapter"], list(PARTS)]


def build(
    recipe: str, parts: Sequence[str], attention: str = SEGMENTS
) -> tuple[SailVLForConditionalGeneration, Network]:
    torch.set_num_threads(1)
    shape = load_recipe(recipe).model
    model = build_model(
        vision_config_of(shape.vision),
        language_config_of(shape.language),
        image_token_id=IMAGE_TOKEN,
        seed=0,
    )
    model.language_model.set_attn_implementation(attention)
    if attention == "eager":
        model.vision_model.set_attn_implementation(attention)
    freeze_except(model.train(), parts)
    return model, Network(shape, count_model(model))


def row(network: Network, num_samples: int) -> tuple[dict[str, torch.Tensor], int, int]:
    """A row of which half is images; its inputs, its visual tokens, its labels."""
    shape = network.shape
    tiles = TOKENS // shape.tokens_per_tile // 2
    visual = tiles * shape.tokens_per_tile
    ids = torch.randint(20, 300, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    ids[0, :visual] = IMAGE_TOKEN
    labels = ids.clone()
    labels[0, :visual] = -100
    segments = 1 + torch.arange(TOKENS)[None] * num_samples // TOKENS
    size = shape.vision.image_size
    pixels = torch.zeros(tiles, 3, size, size)
    inputs = {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": segments,
        "pixel_values": pixels,
    }
    return inputs, visual, int((labels[0, 1:] != -100).sum())


def kept_bytes(model: torch.nn.Module, inputs: dict[str, torch.Tensor], autocast: bool) -> int:
    """Bytes of the storages that autograd keeps, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model(**inputs)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("parts", STAGES, ids="+".join)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", ["tiny", "tiny-moe"])
def test_activations_are_those_that_autograd_keeps(recipe, autocast, parts, monkeypatch):
    monkeypatch.setenv(OVERRIDE, FUSED)
    model, network = build(recipe, parts)
    inputs, visual, num_labels = row(network, num_samples=2)
    learning, e = Learning.of(parts), 2 if autocast else 4
    planned = activations(network, learning, e, checkpointing=False)
    expected = (
        planned.per_visual_token * visual
        + planned.per_token * TOKENS
        + planned.per_label * num_labels
    )
    if autocast:
        expected += copied(network, learning, Layout("ddp", False, False, 1, 1))
    assert kept_bytes(model, inputs, autocast) == pytest.approx(expected, rel=0.025)


@pytest.mark.parametrize("parts", STAGES, ids="+".join)
@pytest.mark.parametrize("recipe", ["tiny", "tiny-moe"])
def test_weights_gradients_and_moments_are_exact(recipe, parts):
    """The plain engine's tensors, byte for byte (its step counters left out)."""
    model, network = build(recipe, parts)
    stage = load_recipe(recipe).alignment.world_knowledge
    engine = Engine(
        model, stage.model_copy(update={"trainable": parts, "optimizer": "adamw", "part_lr": {}})
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    engine.learner.optimizer.step()
    moments = sum(
        tensor.nbytes
        for state in engine.learner.optimizer.state.values()
        for tensor in state.values()
        if tensor.dim()
    )
    layout = Layout("ddp", False, False, 1, gpus=1)
    planned = memory_of(network, Learning.of(parts), layout, TOKENS, e=4)
    assert planned.weights == sum(p.nbytes for p in model.parameters())
    assert planned.gradients == gradients
    assert planned.optimizer == moments


@pytest.mark.parametrize("parts", STAGES, ids="+".join)
@pytest.mark.parametrize("recipe", ["tiny", "tiny-moe"])
def test_flops_are_those_that_torch_counts(recipe, parts, monkeypatch):
    """A whole step, and attention alone: plain attention, whose products torch can count, looks at
    every pair of positions, so the causal half is undone by asking for twice the length."""
    monkeypatch.setenv(OVERRIDE, "eager")
    model, network = build(recipe, parts, attention="eager")
    inputs, visual, num_labels = row(network, num_samples=1)
    with FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}

    assumed = Assumptions(visual_share=visual / TOKENS, label_share=num_labels / TOKENS)
    flops, learning = network.flop_model(), Learning.of(parts)
    step = token_flops(network, learning, flops, 2 * TOKENS - 1, assumed)[0] * TOKENS
    assert sum(counts.values()) == pytest.approx(step, rel=0.03)

    if "vision" not in parts:
        return  # without a gradient torch multiplies strided inputs of matrices by bmm, too
    no_pairs = replace(flops, per_patch_pair=0.0, per_token_pair=0.0)
    products = token_flops(network, learning, no_pairs, 2 * TOKENS - 1, assumed)[0] * TOKENS
    assert counts["aten.bmm"] == pytest.approx(step - products, rel=0.03)


def test_the_plan_knows_how_many_logits_exist_at_a_time():
    assert LOGITS_AT_ONCE == output_layer.LOGITS_AT_ONCE


def networks() -> dict[str, Network]:
    return {
        name: Network(load_recipe(name).model, count_recipe(load_recipe(name).model))
        for name in ("8b", "a3b", "2b-anyres", "tiny")
    }


@pytest.mark.parametrize("name", ["8b", "a3b", "2b-anyres", "tiny"])
@pytest.mark.parametrize("gpus", [2, 64])
@pytest.mark.parametrize("e", [2, 4])
def test_every_saving_saves(name, gpus, e):
    network = networks()[name]
    for parts in STAGES:
        learning = Learning.of(parts)

        def total(parallel, offload=False, checkpointing=False, learning=learning):
            layout = Layout(parallel, offload, checkpointing, 2, gpus)
            return memory_of(network, learning, layout, 8192, e=e).total

        sizes = [total(parallel) for parallel in PARALLEL]
        assert sizes == sorted(sizes, reverse=True)
        for parallel in PARALLEL:
            assert total(parallel, checkpointing=True) < total(parallel)
        for parallel in ("zero2", "zero3"):
            assert total(parallel, offload=True) < total(parallel)


def test_offload_moves_state_to_the_host():
    network, learning = networks()["8b"], Learning.of(PARTS)
    memory = memory_of(network, learning, Layout("zero2", True, True, 1, 8), 8192)
    assert memory.optimizer == 0
    assert memory.host == pytest.approx(16 * network.total / 8, abs=1)


def test_experts_are_shared_by_their_ranks():
    network, learning = networks()["a3b"], Learning.of(PARTS)
    alone = memory_of(network, learning, Layout("ddp", False, True, 1, 64), 8192)
    shared = memory_of(network, learning, Layout("ddp", False, True, 1, 64, 8), 8192)
    away = network.counted.experts * 7 / 8
    for name, width in (("weights", 4), ("gradients", 4), ("optimizer", 8)):
        saved = getattr(alone, name) - getattr(shared, name)
        assert saved == pytest.approx(width * away), name
    assert shared.activations > alone.activations  # what arrived, and what came back
    with pytest.raises(ValueError, match="128 experts"):
        memory_of(network, learning, Layout("ddp", False, True, 1, 64, 3), 8192)
    with pytest.raises(ValueError, match="no experts"):
        memory_of(networks()["8b"], learning, Layout("ddp", False, True, 1, 64, 8), 8192)
    with pytest.raises(ValueError, match="goes with ddp: zero2"):
        memory_of(network, learning, Layout("zero2", False, True, 1, 64, 8), 8192)
