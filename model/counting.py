"""How many parameters a network has, counted on shapes alone: no weights, no download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from model.config import SailVLConfig, language_config_of, vision_config_of
from model.layouts import EMBEDDING, HEAD
from model.modeling import SailVLForConditionalGeneration


@dataclass(frozen=True, slots=True)
class Count:
    """Parameters of a network; a tied matrix counts once where nothing else is said.

    Attributes:
        vision: of SAIL-ViT.
        adapter: of the adapter.
        language: of the decoder, embedding and output layer included.
        tied: of the output layer when it is the embedding itself, otherwise 0. The released
            layout stores them all the same.
        experts: of all experts of all layers, 0 for a dense model; in `language`, too.
        active: of the decoder that take part in one text token: everything but the experts that
            the router leaves out. Embedding and output layer included.
        active_without_embeddings: the same without embedding and output layer.
    """

    vision: int
    adapter: int
    language: int
    tied: int
    experts: int
    active: int
    active_without_embeddings: int

    @property
    def distinct(self) -> int:
        """All parameters, a tied matrix once."""
        return self.vision + self.adapter + self.language

    @property
    def stored(self) -> int:
        """All parameters in the released layout, a tied matrix twice."""
        return self.distinct + self.tied

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the stored tensors, file headers not counted."""
        return self.stored * dtype.itemsize


def empty_model(config: SailVLConfig) -> SailVLForConditionalGeneration:
    """The network on the meta device: shapes without memory."""
    with torch.device("meta"):
        return SailVLForConditionalGeneration(config)


def count_recipe(section: Any) -> Count:
    """Count the network of a recipe's `model` section (read by attribute).

    The section's own sizes count; what `pretrained_language` and `pretrained_vision` name is not
    looked at, since the recipe states its shape.
    """
    config = SailVLConfig(
        vision_config=vision_config_of(section.vision).to_dict(),
        text_config=language_config_of(section.language).to_dict(),
        downsample=section.downsample,
    )
    return count_model(empty_model(config))


def count_model(model: SailVLForConditionalGeneration) -> Count:
    """Count any network of ours, on any device."""
    # parameters() gives a tied matrix once.
    sizes = {
        part: sum(parameter.numel() for parameter in module.parameters())
        for part, module in model.parts().items()
    }
    text = model.config.text_config
    idle = expert_values = 0
    if model.config.is_moe:
        expert_values = sum(
            parameter.numel()
            for name, parameter in model.language_model.named_parameters()
            if ".mlp.experts." in name
        )
        idle = expert_values // text.num_experts * (text.num_experts - text.num_experts_per_tok)
    embedding, head = model.get_parameter(EMBEDDING), model.get_parameter(HEAD)
    ends = embedding.numel() + (0 if head is embedding else head.numel())
    active = sizes["language"] - idle
    return Count(
        **sizes,
        tied=head.numel() if head is embedding else 0,
        experts=expert_values,
        active=active,
        active_without_embeddings=active - ends,
    )
