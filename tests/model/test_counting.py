"""Exact sizes of the released networks, counted on the meta device."""

from __future__ import annotations

import pytest
import torch

from model.config import SailVLConfig, language_config_of, vision_config_of
from model.counting import Count, count_model, count_recipe, empty_model
from model.layouts import released_views
from model.release import save_released
from model.release_config import parse_config, released_body
from model.shards import stored_shape
from sailyard.recipe import load_recipe
from tests.model.test_release import tensors_of
from tests.model.tiny import network, processor


def count(recipe: str) -> Count:
    return count_recipe(load_recipe(recipe).model)


def released_2b() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the released 2B checkpoint's weight index, written out."""
    tower, language = "vision_model", "language_model.model"
    shapes: dict[str, tuple[int, ...]] = {
        f"{tower}.preprocessor.patchifier.proj.weight": (1536, 3, 14, 14),
        f"{tower}.preprocessor.patchifier.proj.bias": (1536,),
        f"{tower}.preprocessor.patchifier.norm.weight": (1536,),
        f"{tower}.preprocessor.pos_embed": (1, 1024, 1536),
        f"{tower}.trunk.post_trunk_norm.weight": (1536,),
        "mlp1.0.weight": (6144,),
        "mlp1.0.bias": (6144,),
        "mlp1.1.weight": (2048, 6144),
        "mlp1.1.bias": (2048,),
        "mlp1.3.weight": (2048, 2048),
        "mlp1.3.bias": (2048,),
        f"{language}.embed_tokens.weight": (151936, 2048),
        f"{language}.norm.weight": (2048,),
        "language_model.lm_head.weight": (151936, 2048),
    }
    block = {
        "attn.qkv": (4608, 1536),
        "attn.proj": (1536, 1536),
        "mlp.fc1": (4096, 1536),
        "mlp.fc2": (1536, 4096),
        "mlp.fc3": (4096, 1536),
        "norm_1": (1536,),
        "norm_2": (1536,),
    }
    layer = {
        "self_attn.q_proj": (2048, 2048),
        "self_attn.k_proj": (1024, 2048),
        "self_attn.v_proj": (1024, 2048),
        "self_attn.o_proj": (2048, 2048),
        "self_attn.q_norm": (128,),
        "self_attn.k_norm": (128,),
        "mlp.gate_proj": (6144, 2048),
        "mlp.up_proj": (6144, 2048),
        "mlp.down_proj": (2048, 6144),
        "input_layernorm": (2048,),
        "post_attention_layernorm": (2048,),
    }
    for number in range(24):
        shapes |= {f"{tower}.trunk.blocks.{number}.{k}.weight": s for k, s in block.items()}
    for number in range(28):
        shapes |= {f"{language}.layers.{number}.{k}.weight": s for k, s in layer.items()}
    return shapes


def test_2b_has_exactly_the_released_tensors():
    section = load_recipe("2b").model
    config = SailVLConfig(
        vision_config=vision_config_of(section.vision).to_dict(),
        text_config=language_config_of(section.language).to_dict(),
    )
    again = parse_config(released_body(config, torch.bfloat16, True))
    views = released_views(empty_model(again))
    assert {name: stored_shape(pieces) for name, pieces in views.items()} == released_2b()
    assert again.tokens_per_tile == 256


def test_2b_weighs_what_the_released_index_says():
    found = count("2b")
    assert found.stored == 2_730_565_120
    assert found.num_bytes(torch.bfloat16) == 5_461_130_240
    assert found.distinct == 2_419_400_192
    assert found.vision == 682_031_616
    assert found.adapter == 16_793_600
    assert found.active == found.language == 1_720_574_976  # dense: every parameter
    assert found.active_without_embeddings == found.language - 151_936 * 2048


def test_8b_and_a3b_have_the_sizes_of_the_paper():
    """Paper Table 1: 8.8B; 31.1B of which 3B are active."""
    dense, sparse = count("8b"), count("a3b")
    assert dense.stored == dense.distinct == 8_914_730_496
    assert sparse.distinct == pytest.approx(31.1e9, rel=0.01)
    assert 3.0e9 < sparse.active < 3.6e9
    assert sparse.active - sparse.active_without_embeddings == 2 * 151_936 * 2048
    idle = 48 * 120 * 3 * 768 * 2048  # layers, experts left out, matrices of one expert
    assert sparse.language - sparse.active == idle


@pytest.mark.parametrize("moe", [False, True])
def test_counts_equal_what_is_written(tmp_path, moe):
    model = network(moe)
    save_released(tmp_path, model, processor())
    found = count_model(model)
    assert found.stored == sum(tensor.numel() for tensor in tensors_of(tmp_path).values())
    assert (found.active < found.language) is moe
