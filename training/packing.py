"""Dynamic packing: samples of unequal length into rows without padding (paper section 5).

Shape legend: B rows, T tokens per row.

Samples packed into one row never see each other: `segment_ids` numbers them from 1 (0 is
padding) and the model turns that into a block-diagonal causal mask; positions restart at 0.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypedDict, cast

import numpy as np
import torch

from model.batching import ImageInputs, image_inputs
from model.processor import Encoded

IGNORE_INDEX = -100


class PackedBatch(TypedDict):
    """One batch of packed rows, ready for the model."""

    input_ids: torch.Tensor  # int64 [B, T]
    labels: torch.Tensor  # int64 [B, T], IGNORE_INDEX where no loss is taken
    position_ids: torch.Tensor  # int64 [B, T], restart at 0 in every sample
    segment_ids: torch.Tensor  # int64 [B, T], 1-based sample number in the row, 0 = padding
    turn_shares: torch.Tensor  # float32 [B, T], 1 / labelled tokens of the same answer, else 0
    images: ImageInputs  # in the row-major order of the samples


def pack_rows(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """First-fit-decreasing: indices of the samples in each row of at most `seq_len` tokens.

    Used where the whole set is at hand (rollouts); training streams use `fill_row`.
    Raises ValueError naming the first sample that is longer than a row.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > seq_len:
            raise ValueError(
                f"sample {index} has {length} tokens, more than a row of {seq_len}: "
                "raise seq_len or shorten the sample"
            )
        for row, space in enumerate(free):
            if length <= space:
                rows[row].append(index)
                free[row] -= length
                break
        else:
            rows.append([index])
            free.append(seq_len - length)
    return rows


def fill_row(lengths: Sequence[int], seq_len: int) -> list[int]:
    """Choose buffer positions for one row: the oldest sample, then the best fits.

    `lengths` is the look-ahead buffer, oldest first. Taking the oldest first means that no
    sample waits longer than the buffer is deep, however awkward its length (paper section 5:
    over-long samples are forced in before they starve).
    """
    # Best fits come off the end of a list sorted by length; among equals the oldest is last.
    order = sorted(range(1, len(lengths)), key=lambda i: (lengths[i], -i))
    keys = [lengths[i] for i in order]
    chosen = [0]
    space = seq_len - lengths[0]
    while (place := bisect_right(keys, space) - 1) >= 0:
        chosen.append(order.pop(place))
        space -= keys.pop(place)
    return chosen


def truncated(encoded: Encoded, seq_len: int, image_token_id: int) -> Encoded | None:
    """The first `seq_len` tokens of a sample, or None where that cannot be trained on.

    That is where the cut would go through an image (its visual tokens and its pixels would no
    longer match), or would leave no token with a loss.
    """
    cut = encoded.input_ids[seq_len:]
    mask = encoded.loss_mask[:seq_len]
    if (cut == image_token_id).any() or not mask[1:].any():
        return None
    return replace(encoded, input_ids=encoded.input_ids[:seq_len], loss_mask=mask)


def collate_rows(rows: Sequence[Sequence[Encoded]], seq_len: int) -> PackedBatch:
    """Lay samples out in rows of `seq_len` tokens.

    The label of a position is its own token; the model shifts by one inside each segment, so
    the first token of a sample is never predicted from its neighbour.
    """
    shape = (len(rows), seq_len)
    input_ids = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    segment_ids = np.zeros(shape, dtype=np.int64)
    turn_shares = np.zeros(shape, dtype=np.float32)
    for r, row in enumerate(rows):
        start = 0
        for number, encoded in enumerate(row, start=1):
            end = start + len(encoded.input_ids)
            if end > seq_len:
                raise ValueError(f"row {r} holds {end} tokens, more than seq_len {seq_len}")
            input_ids[r, start:end] = encoded.input_ids
            labels[r, start:end] = np.where(encoded.loss_mask, encoded.input_ids, IGNORE_INDEX)
            labels[r, start] = IGNORE_INDEX  # nothing precedes it in its own sample
            position_ids[r, start:end] = np.arange(end - start)
            segment_ids[r, start:end] = number
            turn_shares[r, start:end] = shares_of_turns(encoded.loss_mask)
            start = end
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        segment_ids=torch.from_numpy(segment_ids),
        turn_shares=torch.from_numpy(turn_shares),
        images=image_inputs(encoded for row in rows for encoded in row),
    )


def on_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """The same batch, its tensors on `device`."""
    if device.type == "cpu":
        return batch

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: moved(tensor) for key, tensor in value.items()}
        return value if value is None else value.to(device, non_blocking=True)

    return cast(PackedBatch, {name: moved(value) for name, value in batch.items()})


def shares_of_turns(loss_mask: np.ndarray) -> np.ndarray:
    """[T] float32: each labelled token's share of its answer, so that every answer sums to 1.

    An answer is a run of labelled tokens; between two of them stands at least the next turn's
    header. The first token of a sample carries no loss and counts for nothing.
    """
    mask = loss_mask.astype(bool).copy()
    mask[:1] = False
    starts = mask & ~np.concatenate([[False], mask[:-1]])
    answer = np.cumsum(starts)  # number of the answer each labelled token belongs to, from 1
    lengths = np.bincount(answer[mask], minlength=int(answer.max(initial=0)) + 1)
    return np.where(mask, 1.0 / np.maximum(lengths[answer], 1), 0.0).astype(np.float32)


class PackingStats:
    """Counts how well the rows were filled, and what padding to the longest would have cost."""

    def __init__(self) -> None:
        self.tokens = 0
        self.slots = 0
        self.padded_slots = 0
        self.samples = 0

    def add(self, rows: Sequence[Sequence[int]], seq_len: int) -> None:
        """Count one batch; `rows` holds the sample lengths of each row."""
        lengths = [length for row in rows for length in row]
        self.tokens += sum(lengths)
        self.samples += len(lengths)
        self.slots += len(rows) * seq_len
        self.padded_slots += len(lengths) * max(lengths)

    def summary(self) -> dict[str, float]:
        """`packing_fill`: share of slots that hold a token. `padding_ratio`: share of slots that
        one-sample-per-row padding to the longest of the batch would have wasted."""
        return {
            "packing_fill": self.tokens / max(self.slots, 1),
            "padding_ratio": 1 - self.tokens / max(self.padded_slots, 1),
            "samples": self.samples,
        }

    def state(self) -> list[int]:
        return [self.tokens, self.slots, self.padded_slots, self.samples]

    def load(self, state: Sequence[int]) -> None:
        self.tokens, self.slots, self.padded_slots, self.samples = state
