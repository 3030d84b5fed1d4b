"""Attention masks and positions of packed and padded rows.

Shape suffixes: B rows, T tokens of a row.
"""

from __future__ import annotations

import torch


def block_mask(segment_ids_BT: torch.Tensor) -> torch.Tensor:
    """Causal inside a segment, blind to every other one.

    Args:
        segment_ids_BT: [B, T] integers; equal numbers in a row are one sample, 0 is padding.

    Returns:
        [B, 1, T, T] bool, True where a query may look. Padding looks at itself only: a row of
        attention with no key at all would be NaN.
    """
    length = segment_ids_BT.shape[1]
    same = segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :]
    same = same & (segment_ids_BT != 0)[:, None, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids_BT.device).tril_()
    diagonal = torch.eye(length, dtype=torch.bool, device=segment_ids_BT.device)
    return (same & causal) | diagonal


def sample_starts(segment_ids_BT: torch.Tensor) -> torch.Tensor:
    """[B, T] bool, True at the first token of every sample and of every stretch of padding."""
    starts = torch.ones_like(segment_ids_BT, dtype=torch.bool)
    starts[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    return starts


def block_positions(segment_ids_BT: torch.Tensor) -> torch.Tensor:
    """Positions that start again at 0 in every segment.

    Args:
        segment_ids_BT: [B, T]; the tokens of a segment are adjacent.

    Returns:
        [B, T] int64.
    """
    length = segment_ids_BT.shape[1]
    index = torch.arange(length, device=segment_ids_BT.device).expand_as(segment_ids_BT)
    first = torch.where(sample_starts(segment_ids_BT), index, 0).cummax(dim=1).values
    return index - first


def segments_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Segment ids of any mask the model takes.

    Args:
        attention_mask: [B, T] segment ids (a 0/1 padding mask is one segment per row), or a
            [B, 1, T, T] bool mask of `block_mask`.

    Returns:
        [B, T] int64, 0 for padding. In a block mask, padding is what sees one key and is seen by
        one query; a sample of a single token looks the same and counts as padding.
    """
    if attention_mask.ndim == 2:
        return attention_mask.long()
    mask = attention_mask[:, 0]
    keys, queries = mask.sum(dim=2), mask.sum(dim=1)
    return torch.where((keys > 1) | (queries > 1), (keys == 1).long().cumsum(dim=1), 0)
