"""The decoder on embeddings: packed rows for every attention back end, losses, logits.

Shape suffixes: B rows, T tokens of a row, D decoder width, V vocabulary, M labelled tokens, E
experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from model.attention import BACKEND, flex_mask, segment_layout, varlen
from model.masks import block_mask, block_positions, sample_starts, segments_of
from model.moe import balance_loss, router_z_loss
from model.output_layer import token_losses

IGNORE = -100  # label of a token that carries no loss


@dataclass
class SailVLOutput(ModelOutput):
    """What a forward pass returns.

    Attributes:
        loss: scalar, mean of `loss_per_token` plus `aux_loss`; None without labels.
        logits: [B, T, V], or of the positions that `logits_to_keep` names; None with labels.
        loss_per_token: [M] float32, -log probability of each labelled token at `temperature`.
        label_rows, label_cols: [M] int64, where in `labels` each labelled token stands, row-major.
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
    logits_to_keep: int | torch.Tensor = 0,
    temperature: float = 1.0,
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
        logits_to_keep: without labels, how many last positions get logits (0 means all), or the
            positions themselves, [n] int64.
        temperature: with labels, what the logits are divided by (RL's replies are sampled so).
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
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        out.logits = language_model.lm_head(hidden_BTD[:, kept])
        return out
    rows, cols = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    out.label_rows, out.label_cols = rows, cols + 1
    targets = labels[rows, cols + 1]
    out.loss_per_token = token_losses(
        language_model.lm_head, hidden_BTD[rows, cols], targets, temperature
    )
    # A batch with nothing to learn has loss 0 (not NaN) and still reaches every parameter.
    out.loss = out.loss_per_token.sum() / max(1, targets.numel())
    if targets.numel() == 0:
        out.loss = out.loss + hidden_BTD.sum() * 0.0
    if out.aux_loss is not None:
        out.loss = out.loss + out.aux_loss
    return out


def _sample_lengths(segments_BT: torch.Tensor) -> torch.Tensor:
    """[S] tokens of every sample and every stretch of padding, row after row."""
    first = sample_starts(segments_BT).reshape(-1).nonzero()[:, 0]
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
