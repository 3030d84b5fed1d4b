"""The network's parts compute what transformers' own classes compute with the same weights."""

from __future__ import annotations

import pytest
import torch
from transformers import Aimv2VisionConfig, Aimv2VisionModel, AutoModelForCausalLM

from model.language import language_forward
from tests.model.tiny import SIZE, network, vision_config


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_tower_is_aimv2_layer_by_layer(attention):
    tower = network().vision_model
    tower.set_attn_implementation(attention)
    config = Aimv2VisionConfig(**{**vision_config().to_dict(), "model_type": "aimv2_vision_model"})
    reference = Aimv2VisionModel(config).eval()
    reference.load_state_dict(tower.state_dict())
    pixels = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    outputs: list[torch.Tensor] = []
    for layer in tower.encoder.layers:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.inference_mode():
        features = tower.encode(pixels)
        expected = reference(pixels, output_hidden_states=True)
    # hidden_states: what enters each layer, and what leaves the last
    for ours, theirs in zip(outputs, expected.hidden_states[1:], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features, expected.last_hidden_state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("moe", [False, True])
def test_the_decoder_is_qwen3(moe):
    decoder = network(moe).language_model
    kind = "Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM"
    assert type(decoder).__name__ == kind
    reference = AutoModelForCausalLM.from_config(decoder.config, attn_implementation="eager").eval()
    reference.load_state_dict(decoder.state_dict())
    ids = torch.randint(0, 250, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        embeds = decoder.get_input_embeddings()(ids)
        ours = language_forward(decoder, embeds, attention_mask=torch.ones_like(ids))
        theirs = reference(input_ids=ids)
        labelled = language_forward(
            decoder, embeds, attention_mask=torch.ones_like(ids), labels=ids
        )
        expected = reference(input_ids=ids, labels=ids)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=1e-4)
    tokens = labelled.loss_per_token.mean()
    torch.testing.assert_close(tokens, expected.loss, atol=1e-4, rtol=1e-4)
