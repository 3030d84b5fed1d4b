"""Small measurements with a captioner: is an answer believable, does a source help.

Every function packs samples into one row (the model keeps them apart by segment), so nothing is
padding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from model.batching import ImageInputs, image_inputs
from model.language import IGNORE
from model.masks import block_mask, block_positions
from sailyard.media import decode_image
from sailyard.samples import Sample

if TYPE_CHECKING:
    from model.modeling import SailVLForConditionalGeneration
    from model.processor import Encoded, SailVLProcessor

ROW_TOKENS = 4096
PHRASE_TOKENS = 1024  # of a row of phrases, whose attention mask is dense
# A captioner contradicts an answer when it is this sure of another first word.
SURE = 0.7


@dataclass(frozen=True, slots=True)
class Row:
    """Samples side by side.

    Attributes:
        input_ids, segment_ids, labels: [1, T]; segments count from 1.
        images: of all samples, in order.
    """

    input_ids: torch.Tensor
    segment_ids: torch.Tensor
    labels: torch.Tensor
    images: ImageInputs


def encode(processor: SailVLProcessor, samples: Sequence[Sample]) -> list[Encoded]:
    """Conversations with their images, as the model reads them."""
    return [
        processor.encode(
            sample.messages,
            [decode_image(data) for data in sample.images],
            is_video=sample.is_video,
        )
        for sample in samples
    ]


def pack(encoded: Sequence[Encoded]) -> Row:
    """One row; labels stand on trained tokens only."""
    lengths = [len(item.input_ids) for item in encoded]
    ids = np.concatenate([item.input_ids for item in encoded])
    trained = np.concatenate([item.loss_mask for item in encoded])
    return Row(
        input_ids=torch.from_numpy(ids)[None],
        segment_ids=torch.from_numpy(np.repeat(np.arange(1, len(lengths) + 1), lengths))[None],
        labels=torch.from_numpy(np.where(trained, ids, IGNORE))[None],
        images=image_inputs(encoded),
    )


def rows_of(lengths: Sequence[int], limit: int = ROW_TOKENS) -> Iterator[list[int]]:
    """Consecutive positions that fit into rows of `limit` tokens; a longer one stands alone."""
    row: list[int] = []
    used = 0
    for position, length in enumerate(lengths):
        if row and used + length > limit:
            yield row
            row, used = [], 0
        row.append(position)
        used += length
    if row:
        yield row


def _forward(  # type: ignore[no-untyped-def]
    model: SailVLForConditionalGeneration, row: Row, **wanted: torch.Tensor
):
    inputs: dict[str, torch.Tensor | None] = {
        "input_ids": row.input_ids,
        "attention_mask": row.segment_ids,
        "pixel_values": row.images["pixel_values"],
        "image_grids": row.images["image_grids"],
        **wanted,
    }
    moved = {name: t if t is None else t.to(model.device) for name, t in inputs.items()}
    return model(**moved, output_router_logits=False)


@torch.inference_mode()
def answer_probabilities(
    model: SailVLForConditionalGeneration, encoded: Sequence[Encoded]
) -> np.ndarray:
    """Mean probability of the trained tokens of each sample, [N]."""
    model.eval()
    found = np.zeros(len(encoded))
    for positions in rows_of([len(item.input_ids) for item in encoded]):
        row = pack([encoded[p] for p in positions])
        out = _forward(model, row, labels=row.labels)
        segments = row.segment_ids[out.label_rows.cpu(), out.label_cols.cpu()] - 1
        probabilities = (-out.loss_per_token).exp().cpu()
        totals = torch.zeros(len(positions)).index_add_(0, segments, probabilities)
        counts = torch.bincount(segments, minlength=len(positions)).clamp_min(1)
        found[positions] = (totals / counts).numpy()
    return found


@torch.inference_mode()
def contradictions(
    model: SailVLForConditionalGeneration, encoded: Sequence[Encoded]
) -> tuple[np.ndarray, np.ndarray]:
    """How many answers of each sample the model contradicts [N], and how many there are [N].

    It contradicts an answer when it gives more than SURE to another first token. A model that
    knows little is seldom sure and contradicts nobody.
    """
    model.eval()
    against, answers = np.zeros(len(encoded), dtype=int), np.zeros(len(encoded), dtype=int)
    for positions in rows_of([len(item.input_ids) for item in encoded]):
        row = pack([encoded[p] for p in positions])
        (columns,) = (row.labels[0] != IGNORE).nonzero(as_tuple=True)
        # The first trained token of a turn is the one whose neighbour before it is not trained.
        columns = columns[row.labels[0, columns - 1] == IGNORE]
        segments = row.segment_ids[0, columns] - 1
        logits = _forward(model, row, logits_to_keep=columns - 1).logits[0]
        probability, guess = (t.cpu() for t in logits.float().softmax(dim=-1).max(dim=-1))
        wrong = (guess != row.labels[0, columns]) & (probability > SURE)
        owners = np.array(positions)[segments.numpy()]
        np.add.at(answers, owners, 1)
        np.add.at(against, owners[wrong.numpy()], 1)
    return against, answers


def tune(
    model: SailVLForConditionalGeneration,
    encoded: Sequence[Encoded],
    *,
    lr: float,
    batch_tokens: int,
    seed: int,
) -> SailVLForConditionalGeneration:
    """A copy of the model after one pass over the samples, in a seeded order.

    A probe, not a training stage: AdamW without warm-up, all parts, no checkpoints.
    """
    tuned = copy.deepcopy(model).train()
    tuned.requires_grad_(True)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    order = np.random.default_rng(seed).permutation(len(encoded))
    shuffled = [encoded[int(i)] for i in order]
    for positions in rows_of([len(item.input_ids) for item in shuffled], batch_tokens):
        row = pack([shuffled[p] for p in positions])
        out = _forward(tuned, row, labels=row.labels)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return tuned.eval()


@torch.inference_mode()
def embed_phrases(
    model: SailVLForConditionalGeneration, processor: SailVLProcessor, phrases: Sequence[str]
) -> np.ndarray:
    """Mean-pooled last hidden states of each phrase, [N, D] float32 (spec A12)."""
    model.eval()
    ids = [
        np.array(processor.encode_text(phrase) or [processor.pad_token_id]) for phrase in phrases
    ]
    width = cast("torch.nn.Embedding", model.get_input_embeddings()).embedding_dim
    table = np.zeros((len(phrases), width), dtype=np.float32)
    for positions in rows_of([len(item) for item in ids], PHRASE_TOKENS):
        lengths = [len(ids[p]) for p in positions]
        row = torch.from_numpy(np.concatenate([ids[p] for p in positions]))[None]
        segments = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
        hidden = _hidden(model, row.to(model.device), (segments + 1).to(model.device))
        pooled = torch.zeros(len(lengths), hidden.shape[-1])
        pooled.index_add_(0, segments, hidden.float().cpu())
        table[positions] = (pooled / torch.tensor(lengths)[:, None]).numpy()
    return table


def _hidden(
    model: SailVLForConditionalGeneration, ids: torch.Tensor, segments: torch.Tensor
) -> torch.Tensor:
    """Last hidden states [T, D] of packed text."""
    output = model.language_model.model(
        inputs_embeds=model.get_input_embeddings()(ids),
        attention_mask=block_mask(segments[None]),
        position_ids=block_positions(segments[None]),
        use_cache=False,
    )
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden
