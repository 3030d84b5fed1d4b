"""Which of a few fixed answers a model prefers, by one forward pass and no decoding.

Judges answer "4" or "yes": one token decides. Reading its probability is many times cheaper
than generating and cannot produce an answer outside the list. Several questions about one image
share what they have in common (picture, caption): the row holds it once and every question
branches off, seeing the trunk and itself but no other question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from model.batching import image_inputs

if TYPE_CHECKING:
    from model.modeling import SailVLForConditionalGeneration
    from model.processor import Encoded, SailVLProcessor

Messages = Sequence[dict[str, str]]


class AmbiguousChoices(ValueError):
    """Two answers begin with the same token, so the first token cannot tell them apart."""


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation that ends in a user turn, and the answers to choose from."""

    messages: Messages
    choices: tuple[str, ...]


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


@dataclass(frozen=True, slots=True)
class Tree:
    """Questions about one image laid out in a row: the common trunk, then a branch each."""

    input_ids: np.ndarray  # [T]
    position_ids: np.ndarray  # [T], a branch goes on where the trunk ends
    branch: np.ndarray  # [T], 0 for the trunk, else the question's number from 1
    ends: list[int]  # last token of each branch
    first: Encoded  # its images are those of all


def grow(encoded: Sequence[Encoded]) -> Tree:
    """Lay out prompts that begin alike; all must show the same images, within the trunk."""
    ids = [item.input_ids for item in encoded]
    # Every branch keeps at least its last token: that is where its answer is read.
    shortest = min(map(len, ids)) - 1
    alike = [
        bool((column == column[0]).all()) for column in np.stack([i[:shortest] for i in ids]).T
    ]
    trunk = sum(1 for _ in takewhile(bool, alike))
    parts = [ids[0][:trunk], *(i[trunk:] for i in ids)]
    positions = [np.arange(trunk), *(np.arange(trunk, len(i)) for i in ids)]
    lengths = [len(part) for part in parts]
    return Tree(
        input_ids=np.concatenate(parts),
        position_ids=np.concatenate(positions),
        branch=np.repeat(np.arange(len(parts)), lengths),
        ends=(np.cumsum(lengths)[1:] - 1).tolist(),
        first=encoded[0],
    )


def tree_mask(branch_BT: torch.Tensor) -> torch.Tensor:
    """[B, 1, T, T] bool: causal, a branch sees itself and the trunk. -1 is padding."""
    length = branch_BT.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=branch_BT.device).tril()
    same = branch_BT[:, :, None] == branch_BT[:, None, :]
    trunk = (branch_BT == 0)[:, None, :]
    # Padding sees itself: a query without any key would be NaN.
    return (causal & (same | trunk))[:, None]


@torch.inference_mode()
def choice_probabilities(
    model: SailVLForConditionalGeneration,
    processor: SailVLProcessor,
    images: Sequence[Sequence[Image.Image]],
    questions: Sequence[Sequence[Question]],
    *,
    batch_size: int = 64,
    on_batch: Callable[[int], Any] = lambda done: None,
) -> list[np.ndarray]:
    """Probability of each answer, renormalised over its question's answers.

    Args:
        images: the pictures of each of N items.
        questions: for each item its K questions; the k-th offers the same answers for all items.
        batch_size: items run at once.
        on_batch: called with the number of items done so far.

    Returns:
        K tables [N, number of answers] float64 whose rows sum to 1.
    """
    if not questions:
        return []
    tokens = [choice_tokens(processor, question.choices) for question in questions[0]]
    tables = [np.zeros((len(questions), len(ids))) for ids in tokens]
    was_training = model.training
    model.eval()
    for start in range(0, len(questions), batch_size):
        window = slice(start, start + batch_size)
        trees = [
            grow([processor.encode(q.messages, list(p), add_generation_prompt=True) for q in qs])
            for p, qs in zip(images[window], questions[window], strict=True)
        ]
        logits_BKV = _end_logits(model, trees, processor.pad_token_id)
        for k, ids in enumerate(tokens):
            tables[k][window] = logits_BKV[:, k, ids].softmax(dim=-1).numpy()
        on_batch(min(start + batch_size, len(questions)))
    model.train(was_training)
    return tables


def _end_logits(
    model: SailVLForConditionalGeneration, trees: Sequence[Tree], pad_token_id: int
) -> torch.Tensor:
    """Logits [B, K, V] float64 at the end of every branch."""
    length = max(len(tree.input_ids) for tree in trees)

    def padded(rows: Sequence[np.ndarray], value: int) -> torch.Tensor:
        table = np.full((len(rows), length), value, dtype=np.int64)
        for row, values in enumerate(rows):
            table[row, : len(values)] = values
        return torch.from_numpy(table).to(model.device)

    ids = padded([tree.input_ids for tree in trees], pad_token_id)
    branch = padded([tree.branch for tree in trees], -1)
    hidden_BTD = model.language_model.model(
        inputs_embeds=model.embed(ids, **image_inputs((t.first for t in trees), model.device)),
        attention_mask=tree_mask(branch),
        position_ids=padded([tree.position_ids for tree in trees], 0),
        use_cache=False,
    ).last_hidden_state
    ends = torch.tensor([tree.ends for tree in trees], device=model.device)
    rows = torch.arange(len(trees), device=model.device)[:, None].expand_as(ends)
    logits: torch.Tensor = model.language_model.lm_head(hidden_BTD[rows, ends])
    return logits.double().cpu()
