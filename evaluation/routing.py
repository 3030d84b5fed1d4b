"""Router health of an expert model on the questions it is scored on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from model.batching import image_inputs
from model.generation import Prompt
from model.moe import RouterMeter

if TYPE_CHECKING:
    from model.modeling import SailVLForConditionalGeneration
    from model.processor import SailVLProcessor


@torch.inference_mode()
def router_health(
    model: SailVLForConditionalGeneration,
    processor: SailVLProcessor,
    prompts: Sequence[Prompt],
) -> dict[str, float]:
    """Entropy (0-1), busiest expert over mean, and dead experts, over the prompts' tokens.

    The vision-text mix of the prompts counts as it is; empty for a dense model.
    """
    if not model.config.is_moe:
        return {}
    meter = RouterMeter(model.config.text_config.num_experts_per_tok)
    model.eval()
    for prompt in prompts:
        # One prompt at a time: no padding token is routed, so none needs a mask.
        encoded = processor.encode(
            prompt.messages, prompt.images, prompt.is_video, add_generation_prompt=True
        )
        output = model(
            input_ids=torch.from_numpy(encoded.input_ids)[None].to(model.device),
            **image_inputs([encoded], model.device),
            output_router_logits=True,
            logits_to_keep=1,
        )
        meter.add(output.router_logits)
    return meter.health().summary()
