"""Expert calibration: raise expert-activation entropy on text by training the routers alone.

The paper (section 2.2) calibrates on language data and finds that text behaviour stays while
entropy on multimodal data rises; it does not say what is trained. Here it is the router weights,
under the token loss (which keeps the behaviour) and the balance loss (which spreads the slots).

Shapes: B rows, T tokens of a row, E experts, D decoder width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from model.language import IGNORE, language_forward
from model.masks import sample_starts
from model.modeling import SailVLForConditionalGeneration
from model.moe import RouterHealth, RouterMeter, balance_loss

# (input_ids [B, T], segment_ids [B, T] with 0 for padding)
TextBatch = tuple[torch.Tensor, torch.Tensor]


class CalibrationError(ValueError):
    """A model that has no experts to calibrate."""


@dataclass(frozen=True, slots=True)
class CalibrationStep:
    """What one step saw, before its update.

    Attributes:
        token_loss: mean over predicted tokens, nats.
        balance: the balance loss without coefficient; 1 is uniform.
        health: of this batch.
    """

    token_loss: float
    balance: float
    health: RouterHealth


@dataclass(frozen=True, slots=True)
class CalibrationMeasure:
    """Token loss (nats per token) and router health over held-out batches."""

    token_loss: float
    health: RouterHealth


@torch.no_grad()
def measure_multimodal(
    model: SailVLForConditionalGeneration, batches: Iterable[Mapping[str, Any]]
) -> CalibrationMeasure:
    """Token loss and router health on samples with pictures, which calibration never sees.

    Args:
        model: with experts; put into eval mode.
        batches: packed rows: `input_ids`, `labels`, `position_ids`, `segment_ids` [B, T],
            and `images`, what `embed` takes of them (`ImageInputs`).

    Returns:
        Loss over the labelled tokens; health over all tokens, visual ones and text around them.

    Raises:
        CalibrationError: the decoder is dense.
    """
    _routers_of(model.language_model)
    model.eval()
    meter = RouterMeter(model.config.text_config.num_experts_per_tok)
    total, num_labels = 0.0, 0
    for batch in batches:
        segment_ids = batch["segment_ids"]
        out = model(
            input_ids=batch["input_ids"],
            **batch["images"],
            position_ids=batch["position_ids"],
            attention_mask=segment_ids,
            labels=batch["labels"],
        )
        assert out.loss_per_token is not None
        assert out.router_logits is not None
        meter.add(out.router_logits, segment_ids.reshape(-1) != 0)
        total += float(out.loss_per_token.sum())
        num_labels += out.loss_per_token.numel()
    return CalibrationMeasure(total / max(1, num_labels), meter.health())


def routers(language_model: PreTrainedModel) -> list[nn.Parameter]:
    """The router weights, one [E, D] per expert layer."""
    return [
        layer.mlp.gate.weight
        for layer in language_model.model.layers
        if hasattr(layer.mlp, "experts")
    ]


def _routers_of(language_model: PreTrainedModel) -> list[nn.Parameter]:
    found = routers(language_model)
    if not found:
        raise CalibrationError(
            f"a {language_model.config.model_type} decoder has no routers; calibrate only "
            f"recipes whose model.language.moe is set"
        )
    return found


class ExpertCalibrator:
    """What the routers of a Qwen3-MoE decoder learn by; everything else is frozen and stays so.

    Args:
        language_model: Qwen3-MoE causal language model.
        balance_weight: weight of the balance loss beside the token loss (our choice).

    Raises:
        CalibrationError: the decoder is dense.
    """

    def __init__(self, language_model: PreTrainedModel, balance_weight: float = 1.0) -> None:
        self.language_model = language_model
        self.balance_weight = balance_weight
        self.parameters = _routers_of(language_model)
        language_model.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.top_k = int(language_model.config.num_experts_per_tok)

    def losses(
        self, input_ids: torch.Tensor, segment_ids: torch.Tensor
    ) -> tuple[torch.Tensor, CalibrationStep]:
        """The loss to descend on packed text rows, both [B, T], and what it is made of."""
        self.language_model.train()
        token_loss, router_logits, real = self._forward(input_ids, segment_ids)
        balance = balance_loss(router_logits, self.top_k, real, 1.0, all_reduce=True)
        meter = RouterMeter(self.top_k)
        meter.add(router_logits, real)
        step = CalibrationStep(float(token_loss.detach()), float(balance.detach()), meter.health())
        return token_loss + self.balance_weight * balance, step

    @torch.no_grad()
    def measure(self, batches: Iterable[TextBatch]) -> CalibrationMeasure:
        """Token loss and router health over batches, nothing trained."""
        self.language_model.eval()
        meter = RouterMeter(self.top_k)
        total, num_batches = 0.0, 0
        for input_ids, segment_ids in batches:
            token_loss, router_logits, real = self._forward(input_ids, segment_ids)
            meter.add(router_logits, real)
            total, num_batches = total + float(token_loss), num_batches + 1
        return CalibrationMeasure(total / max(1, num_batches), meter.health())

    def _forward(
        self, input_ids: torch.Tensor, segment_ids: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]:
        unpredicted = sample_starts(segment_ids) | (segment_ids == 0)
        labels = input_ids.masked_fill(unpredicted, IGNORE)
        embeds = self.language_model.get_input_embeddings()(input_ids)
        out = language_forward(
            self.language_model, embeds, attention_mask=segment_ids, labels=labels
        )
        assert out.loss_per_token is not None
        assert out.router_logits is not None
        token_loss = out.loss_per_token.sum() / max(1, out.loss_per_token.numel())
        return token_loss, out.router_logits, segment_ids.reshape(-1) != 0
