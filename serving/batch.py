"""The rows that are being written together: their shared key-value cache, joining and leaving.

Shape legend: B rows, T cached positions, V vocabulary, P prompt length.

Rows join and leave between any two tokens. The cache is left-padded: a row that joins late or
has a shorter prompt has unused positions in front, which the mask hides, and its own position
ids, so what a row says does not depend on its neighbours (beyond float rounding).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import DynamicCache

from model.batching import image_inputs
from model.processor import Encoded
from serving.reply import Sampling


@dataclass(slots=True)
class Row:
    """One reply's place in the batch; `owner` is whatever the engine hangs on it."""

    owner: Any
    sampling: Sampling
    generator: torch.Generator | None
    num_cached: int
    last_token: int


class Batch:
    """Rows of one model, advanced one token at a time. Not thread-safe: one thread owns it.

    Args:
        model: `SailVLForConditionalGeneration` in evaluation mode.
        never: Ids that only a prompt may hold; a reply that drew an image's place would have no
            pixels for it.
    """

    def __init__(self, model: Any, never: Iterable[int]) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._never = torch.tensor(sorted(never), dtype=torch.long, device=self._device)
        self._cache: DynamicCache | None = None
        self.rows: list[Row] = []

    @torch.inference_mode()
    def join(self, owner: Any, encoded: Encoded, sampling: Sampling) -> int:
        """Read a prompt; returns its first token."""
        ids_1P = torch.from_numpy(encoded.input_ids).to(self._device)[None]
        cache = DynamicCache()
        output = self._model(
            input_ids=ids_1P,
            **image_inputs([encoded], self._device),
            attention_mask=torch.ones_like(ids_1P),
            position_ids=torch.arange(ids_1P.shape[1], device=self._device)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        row = Row(owner, sampling, _generator(sampling, self._device), ids_1P.shape[1], -1)
        row.last_token = self._draw(output.logits[0, -1], row)
        self._cache = cache if self._cache is None else _side_by_side(self._cache, cache)
        self.rows.append(row)
        return row.last_token

    @torch.inference_mode()
    def step(self) -> list[int]:
        """Write one more token of every row; returns them in row order."""
        assert self._cache is not None, "step on an empty batch"
        num_cached = torch.tensor([row.num_cached for row in self.rows], device=self._device)
        longest = self._cache.get_seq_length()
        places = torch.arange(longest + 1, device=self._device)
        mask_BT = (places >= (longest - num_cached)[:, None]).long()
        last = torch.tensor([[row.last_token] for row in self.rows], device=self._device)
        output = self._model(
            input_ids=last,
            attention_mask=mask_BT,
            position_ids=num_cached[:, None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        for row, logits_V in zip(self.rows, output.logits[:, -1], strict=True):
            row.num_cached += 1
            row.last_token = self._draw(logits_V, row)
        return [row.last_token for row in self.rows]

    def keep(self, indices: list[int]) -> None:
        """Leave out every row that is not named, and the padding that nobody needs any more."""
        if len(indices) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in indices]
        if not self.rows:
            self._cache = None
            return
        assert self._cache is not None
        spare = self._cache.get_seq_length() - max(row.num_cached for row in self.rows)
        chosen = torch.tensor(indices, device=self._device)
        self._cache = DynamicCache(
            ddp_cache_data=[
                (keys[chosen, :, spare:], values[chosen, :, spare:])
                for keys, values in _states(self._cache)
            ]
        )

    def _draw(self, logits_V: torch.Tensor, row: Row) -> int:
        """One token: the likeliest, or drawn at the row's temperature inside its top-p nucleus."""
        logits_V = logits_V.float().index_fill(0, self._never, -torch.inf)
        if row.generator is None:
            return int(logits_V.argmax())
        probs_V = (logits_V / row.sampling.temperature).softmax(-1)
        if row.sampling.top_p < 1.0:
            sorted_V, order_V = probs_V.sort(descending=True, stable=True)
            # A token stays while the mass before it is below top_p, so the first always does.
            outside = sorted_V.cumsum(-1) - sorted_V >= row.sampling.top_p
            probs_V = probs_V.index_fill(0, order_V[outside], 0.0)
        return int(torch.multinomial(probs_V, 1, generator=row.generator))


def _states(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of every layer, each [B, heads, T, head_dim]."""
    layers: list[Any] = cache.layers  # all attention layers: a Qwen3 decoder has no other kind
    return [(layer.keys, layer.values) for layer in layers]


def _side_by_side(left: DynamicCache, right: DynamicCache) -> DynamicCache:
    """One cache of both caches' rows, the shorter padded in front."""
    longest = max(left.get_seq_length(), right.get_seq_length())

    def join(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [functional.pad(each, (0, 0, longest - each.shape[-2], 0)) for each in (a, b)]
        )

    return DynamicCache(
        ddp_cache_data=[
            (join(left_keys, right_keys), join(left_values, right_values))
            for (left_keys, left_values), (right_keys, right_values) in zip(
                _states(left), _states(right), strict=True
            )
        ]
    )


def _generator(sampling: Sampling, device: torch.device) -> torch.Generator | None:
    if sampling.temperature == 0:
        return None
    generator = torch.Generator(device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed % 2**63)
    return generator
