"""Which of a few fixed answers a model prefers, by one forward pass and no decoding.

Judges answer "4" or "yes": one token decides. Reading its probability is many times cheaper
than generating and cannot produce an answer outside the list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:
    from model.modeling import SailVLForConditionalGeneration
    from model.processor import Encoded, SailVLProcessor

Conversation = tuple[Sequence[dict[str, str]], Sequence[Image.Image]]


class AmbiguousChoices(ValueError):
    """Two answers begin with the same token, so the first token cannot tell them apart."""


def choice_tokens(processor: SailVLProcessor, choices: Sequence[str]) -> list[int]:
    """First token id of each answer.

    Raises:
        AmbiguousChoices: the tokenizer begins two answers alike, or one is empty.
    """
    firsts = [(processor.encode_text(choice) or [-1])[0] for choice in choices]
    if -1 in firsts or len(set(firsts)) != len(firsts):
        raise AmbiguousChoices(
            f"the answers {list(choices)} do not begin with different tokens "
            f"({firsts}); choose other words"
        )
    return firsts


def left_padded(
    encoded: Sequence[Encoded], pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Prompts as input_ids [B, T], attention_mask [B, T] and their tiles [N, 3, S, S] or None."""
    width = max(len(item.input_ids) for item in encoded)
    ids = torch.full((len(encoded), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(encoded), width), dtype=torch.long)
    for row, item in enumerate(encoded):
        ids[row, width - len(item.input_ids) :] = torch.from_numpy(item.input_ids)
        mask[row, width - len(item.input_ids) :] = 1
    tiles = [torch.from_numpy(item.pixel_values) for item in encoded if item.num_tiles]
    return ids, mask, torch.cat(tiles) if tiles else None


@torch.inference_mode()
def choice_probabilities(
    model: SailVLForConditionalGeneration,
    processor: SailVLProcessor,
    conversations: Sequence[Conversation],
    choices: Sequence[str],
    *,
    batch_size: int = 64,
    bfloat16: bool = True,
    on_batch: Callable[[int], Any] = lambda done: None,
) -> np.ndarray:
    """Probability of each answer, renormalised over the answers.

    Args:
        conversations: (messages ending in a user turn, their images) each.
        choices: the answers; their first tokens must differ.
        bfloat16: run the network under bfloat16 autocast (several times faster on CPUs).
        on_batch: called with the number of conversations done so far.

    Returns:
        [len(conversations), len(choices)] float64; rows sum to 1.
    """
    tokens = choice_tokens(processor, choices)
    table = np.zeros((len(conversations), len(choices)))
    was_training = model.training
    model.eval()
    for start in range(0, len(conversations), batch_size):
        part = conversations[start : start + batch_size]
        encoded = [
            processor.encode(list(messages), list(images), add_generation_prompt=True)
            for messages, images in part
        ]
        ids, mask, pixels = left_padded(encoded, processor.pad_token_id)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            output = model(
                input_ids=ids, attention_mask=mask, pixel_values=pixels, logits_to_keep=1
            )
        chosen = output.logits[:, -1].float()[:, tokens]
        table[start : start + len(part)] = chosen.softmax(dim=-1).double().numpy()
        on_batch(start + len(part))
    model.train(was_training)
    return table
