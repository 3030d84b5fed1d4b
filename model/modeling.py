"""The vision-language model: SAIL-ViT, adapter and a Qwen3 or Qwen3-MoE decoder.

Shape suffixes: B rows, T tokens of a row, D decoder width, V vocabulary, M labelled tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Cache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from model.adapter import Adapter
from model.attention import BACKEND, flex_mask, segment_layout, varlen
from model.config import SailVLConfig
from model.experts import choose_experts
from model.masks import block_mask, block_positions, segments_of
from model.moe import balance_loss, router_z_loss
from model.vision import SailViT

PARTS = ("vision", "adapter", "language")
IGNORE = -100  # label of a token that carries no loss


@dataclass
class SailVLOutput(ModelOutput):
    """What a forward pass returns.

    Attributes:
        loss: scalar, mean of `loss_per_token` plus `aux_loss`; None without labels.
        logits: [B, T, V] (or the last `logits_to_keep` positions); with labels [M, V], only where
            a label is, in the order of `label_rows` and `label_cols`.
        loss_per_token: [M] float32, -log probability of each labelled token.
        label_rows, label_cols: [M] int64, where in `labels` each labelled token stands.
        aux_loss: scalar, balance loss and z-loss of the routers, each times its coefficient; None
            on dense models and without `output_router_logits`.
        router_logits: one [B * T, E] tensor per expert layer.
        past_key_values: the cache, with `use_cache`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    loss_per_token: torch.Tensor | None = None
    label_rows: torch.Tensor | None = None
    label_cols: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    past_key_values: Cache | None = None


def language_forward(
    language_model: PreTrainedModel,
    inputs_embeds: torch.Tensor,
    *,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    past_key_values: Cache | None = None,
    use_cache: bool = False,
    logits_to_keep: int = 0,
    output_router_logits: bool | None = None,
    global_balance: bool = False,
    z_loss_coef: float = 0.0,
) -> SailVLOutput:
    """Run a Qwen3 or Qwen3-MoE causal language model on embeddings; shapes as in `SailVLOutput`.

    The decoder's own loss is not used: it would make logits for every position, and its balance
    loss forgets 1/k and pools the layers.

    Args:
        inputs_embeds: [B, T, D].
        position_ids: [B, T]; by default counted from the mask.
        attention_mask: [B, T] segment ids, 0 for padding (a 0/1 padding mask is the case of one
            sample per row), or [B, 1, T, T] bool (`block_mask`). Samples do not see each other.
        labels: [B, T], token ids aligned with the input (shifted here), -100 for no loss.
        logits_to_keep: without labels, how many last positions get logits; 0 means all.
        output_router_logits: expert models only; by default on when there are labels.
        global_balance: sum the routing statistics over ranks.
        z_loss_coef: weight of the router z-loss; 0 leaves it out.
    """
    config = language_model.config
    is_moe = config.model_type == "qwen3_moe"
    wants_router = is_moe and (
        output_router_logits if output_router_logits is not None else labels is not None
    )
    segments = None
    if attention_mask is not None and past_key_values is None:
        segments = segments_of(attention_mask)
        position_ids = block_positions(segments) if position_ids is None else position_ids
    extra: dict[str, Any] = {"output_router_logits": True} if wants_router else {}
    if use_cache and segments is not None and int(segments.max()) > 1:
        raise ValueError("a cache cannot hold packed rows; generate from one sample per row")
    batch, length, width = inputs_embeds.shape
    mask: torch.Tensor | BlockMask | None = attention_mask
    if attention_mask is not None and segments is not None and not use_cache:
        if "flash" in config._attn_implementation:
            extra |= varlen(_sample_lengths(segments))
            inputs_embeds = inputs_embeds.reshape(1, batch * length, width)
            assert position_ids is not None  # counted with the segments above
            position_ids, mask = position_ids.reshape(1, batch * length), None
        else:
            mask = _for_backend(segments, attention_mask, config, inputs_embeds, extra)
    decoded = language_model.model(
        inputs_embeds=inputs_embeds,
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        **extra,
    )
    out = SailVLOutput(past_key_values=decoded.past_key_values if use_cache else None)
    hidden_BTD = decoded.last_hidden_state.view(batch, length, width)
    if wants_router:
        out.router_logits = tuple(decoded.router_logits)
        real = None if segments is None else segments.reshape(-1) != 0
        out.aux_loss = balance_loss(
            out.router_logits,
            config.num_experts_per_tok,
            real,
            config.router_aux_loss_coef,
            all_reduce=global_balance,
        )
        if z_loss_coef:
            out.aux_loss = out.aux_loss + router_z_loss(
                out.router_logits, real, z_loss_coef, all_reduce=global_balance
            )
    if labels is None:
        kept = hidden_BTD[:, -logits_to_keep:] if logits_to_keep else hidden_BTD
        out.logits = language_model.lm_head(kept)
        return out
    rows, cols = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    out.label_rows, out.label_cols = rows, cols + 1
    out.logits = language_model.lm_head(hidden_BTD[rows, cols])
    targets = labels[rows, cols + 1]
    out.loss_per_token = F.cross_entropy(out.logits.float(), targets, reduction="none")
    # A batch with nothing to learn has loss 0 (not NaN) and still reaches every parameter.
    out.loss = out.loss_per_token.sum() / max(1, targets.numel())
    if targets.numel() == 0:
        out.loss = out.loss + hidden_BTD.sum() * 0.0
    if out.aux_loss is not None:
        out.loss = out.loss + out.aux_loss
    return out


def _sample_lengths(segments_BT: torch.Tensor) -> torch.Tensor:
    """[S] tokens of every sample and every stretch of padding, row after row."""
    starts = torch.ones_like(segments_BT, dtype=torch.bool)
    starts[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    first = starts.reshape(-1).nonzero()[:, 0]
    return torch.diff(first, append=first.new_tensor([segments_BT.numel()]))


def _for_backend(
    segments: torch.Tensor,
    attention_mask: torch.Tensor,
    config: Any,
    inputs_embeds: torch.Tensor,
    extra: dict[str, Any],
) -> torch.Tensor | BlockMask | None:
    """The mask in the form that the decoder's attention takes; may add to `extra`."""
    backend = config._attn_implementation
    if backend == BACKEND:
        extra["segments"] = segment_layout(segments)
        # Any 4-D tensor keeps transformers from making a mask, which nothing would read.
        return inputs_embeds.new_empty((1, 1, 1, 1), dtype=torch.bool)
    if attention_mask.ndim == 2 and int(segments.max()) <= 1:
        return attention_mask
    if backend == "flex_attention":
        return flex_mask(segments)
    mask = attention_mask if attention_mask.ndim == 4 else block_mask(segments)
    if backend == "sdpa":
        return mask
    if backend == "eager":  # adds the mask to the scores
        lowest = torch.finfo(inputs_embeds.dtype).min
        return torch.zeros_like(mask, dtype=inputs_embeds.dtype).masked_fill_(~mask, lowest)
    raise ValueError(
        f"attention backend {backend!r} takes no packed rows; load the model with "
        f"attn_implementation='sdpa', 'eager', 'flex_attention', 'flash_attention_2' or '{BACKEND}'"
    )


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
        logits_to_keep: int = 0,
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
            labels: [B, T] aligned with input_ids, -100 for no loss. Logits are then made for
                labelled positions only.

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
