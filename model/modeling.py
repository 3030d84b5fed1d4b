"""The vision-language model: SAIL-ViT, adapter and a Qwen3 or Qwen3-MoE decoder.

Shape suffixes: B rows, T tokens of a row, D decoder width, V vocabulary; N tiles or images, S side
of a tile in pixels, P patches of all images, p side of a patch in pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Cache,
    GenerationMixin,
    PreTrainedModel,
)

from model.adapter import Adapter
from model.config import SailVLConfig
from model.experts import choose_experts
from model.language import SailVLOutput, language_forward
from model.vision import SailViT

PARTS = ("vision", "adapter", "language")


class SailVLForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """SAIL-VL2: `vision_model` (SAIL-ViT), `mlp1` (adapter), `language_model` (decoder).

    Module names are those of the released checkpoint.
    """

    config_class = SailVLConfig
    config: SailVLConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules: ClassVar = ["Aimv2EncoderLayer", "Qwen3DecoderLayer", "Qwen3MoeDecoderLayer"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _tied_weights_keys: ClassVar = {
        "language_model.lm_head.weight": "language_model.model.embed_tokens.weight"
    }

    def __init__(self, config: SailVLConfig) -> None:
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        vision._experts_implementation = None  # meant for the decoder; a tower would refuse it
        self.vision_model = SailViT(vision)
        self.mlp1 = Adapter(vision.hidden_size, text.hidden_size, config.downsample)
        if config.is_moe and text._experts_implementation is None:
            text._experts_implementation = choose_experts()
        self.language_model = AutoModelForCausalLM.from_config(text)
        self.post_init()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # the decoder dispatches; transformers looks for that in this file's text

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def parts(self) -> dict[str, nn.Module]:
        """The three parts that recipes freeze and train by name."""
        return {"vision": self.vision_model, "adapter": self.mlp1, "language": self.language_model}

    def encode_images(
        self, pixel_values: torch.Tensor, image_grids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Visual tokens, ready to stand among the words.

        Args:
            pixel_values: tiles [N, 3, S, S]; with `image_grids`, the patches [P, 3 * p * p] of
                images of any size, in cell order (`model.patches`).
            image_grids: [N, 2], rows and columns of patches of each image.

        Returns:
            [N, tokens_per_tile, D], or [P / downsample ** 2, D].
        """
        if image_grids is None:
            features = self.vision_model.encode(pixel_values)
        else:
            features = self.vision_model.encode_packed(
                pixel_values, image_grids, self.config.downsample
            )
        tokens: torch.Tensor = self.mlp1(features)
        return tokens

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        image_grids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token embeddings with the visual tokens in place of <IMG_CONTEXT>.

        Tiles are taken in the order their placeholders stand, row after row. In training, a
        batch without images still runs one blank tile, times zero: ranks that differ in modality
        would otherwise wait for each other's gradients for ever.

        Args:
            input_ids: [B, T].
            pixel_values, image_grids: as in `encode_images`, or None.

        Returns:
            [B, T, D].

        Raises:
            ValueError: placeholders and images do not match.
        """
        embeds: torch.Tensor = self.get_input_embeddings()(input_ids)
        slots = (input_ids.reshape(-1) == self.config.image_token_id).nonzero()[:, 0]
        self._check_slots(slots.numel(), pixel_values, image_grids)
        if pixel_values is None or len(pixel_values) == 0:
            return embeds + self._untouched_vision(embeds) if self.training else embeds
        visual = self.encode_images(pixel_values.to(self.dtype), image_grids)
        flat = embeds.reshape(-1, embeds.shape[-1])
        flat = flat.index_copy(0, slots, visual.reshape(-1, visual.shape[-1]).to(flat.dtype))
        return flat.view_as(embeds)

    def _check_slots(
        self,
        num_slots: int,
        pixel_values: torch.Tensor | None,
        image_grids: torch.Tensor | None,
    ) -> None:
        num_rows = 0 if pixel_values is None else len(pixel_values)
        if image_grids is None:
            what, each = "tiles", self.config.tokens_per_tile
            expected = num_rows * each
        else:
            what, each = "patches", self.config.downsample**2
            expected = num_rows // each
        if num_slots != expected:
            raise ValueError(
                f"{num_slots} <IMG_CONTEXT> tokens for {num_rows} {what}, which need {expected}: "
                f"a row was cut inside an image, or pixel_values were left out"
            )

    def _untouched_vision(self, like: torch.Tensor) -> torch.Tensor:
        size = self.config.vision_config.image_size
        blank = like.new_zeros(1, 3, size, size, dtype=self.dtype)
        return self.encode_images(blank).sum().to(like.dtype) * 0.0

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = False,
        logits_to_keep: int | torch.Tensor = 0,
        temperature: float = 1.0,
        output_router_logits: bool | None = None,
        image_grids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SailVLOutput:
        """Embed, place visual tokens, decode; see `embed`, `language_forward`, `SailVLOutput`.

        Args:
            input_ids: [B, T].
            pixel_values, image_grids: as in `encode_images`, in placeholder order, or None.
            attention_mask: [B, T] padding mask or segment ids, or [B, 1, T, T] bool of
                `block_mask`.
            position_ids: [B, T]; by default counted from the mask.
            inputs_embeds: [B, T, D] instead of input_ids and pixel_values.
            labels: [B, T] aligned with input_ids, -100 for no loss. There are losses of labelled
                positions then, and no logits.

        Raises:
            ValueError: placeholders and tiles do not match, or neither ids nor embeddings given.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("forward needs input_ids or inputs_embeds")
            inputs_embeds = self.embed(input_ids, pixel_values, image_grids)
        return language_forward(
            self.language_model,
            inputs_embeds,
            position_ids=position_ids,
            attention_mask=attention_mask,
            labels=labels,
            past_key_values=past_key_values,
            use_cache=bool(use_cache),
            logits_to_keep=logits_to_keep,
            temperature=temperature,
            output_router_logits=output_router_logits,
            global_balance=self.config.router_global_balance,
            z_loss_coef=self.config.router_z_loss_coef,
        )

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Hand the pixels over with the prompt only; later steps hold no placeholder."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and inputs.get("use_cache", True):
            inputs["pixel_values"] = inputs["image_grids"] = None
        return inputs


def freeze_except(model: SailVLForConditionalGeneration, parts: Iterable[str]) -> None:
    """Make exactly the named parts trainable.

    Raises:
        ValueError: a name is not one of vision, adapter, language.
    """
    wanted = set(parts)
    unknown = sorted(wanted - set(PARTS))
    if unknown:
        raise ValueError(f"unknown part {unknown[0]!r}; parts are {', '.join(PARTS)}")
    for name, module in model.parts().items():
        module.requires_grad_(name in wanted)


def part_digests(model: SailVLForConditionalGeneration) -> dict[str, str]:
    """sha256 of each part's tensors (name, dtype, shape, bytes), to prove what a stage changed."""
    return {name: module_digest(module) for name, module in model.parts().items()}


def module_digest(module: nn.Module) -> str:
    """sha256 over a module's state: name, dtype, shape and bytes of every tensor, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(raw.numpy()))
    return digest.hexdigest()


AutoModelForImageTextToText.register(SailVLConfig, SailVLForConditionalGeneration, exist_ok=True)
