"""Floating-point operations of a forward pass, from parameter counts and widths.

A multiply and an add count as two. A weight matrix costs two per parameter and token (Kaplan et
al. 2020, arXiv:2001.08361, section 2.1); attention costs four per unit of width for every pair of
positions that see each other: two for the score, two for the value. A backward pass costs twice
the forward; recomputing activations costs the forward once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cost:
    """Forward FLOPs of a sample or a row, vision (adapter included) and language apart."""

    vision: float
    language: float

    @property
    def total(self) -> float:
        """Both."""
        return self.vision + self.language

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.vision + other.vision, self.language + other.language)


@dataclass(frozen=True, slots=True)
class FlopModel:
    """What one patch, one token and one pair of each cost in a forward pass, in FLOPs.

    Attributes:
        per_patch: weights of tower and adapter, per patch.
        per_patch_pair: attention of all tower layers, per ordered pair of patches of one image.
        per_token: weights of the decoder that a token visits, output layer not counted.
        per_token_pair: attention of all decoder layers, per pair (query, key at or before it).
        per_label: the output layer, per token with a loss.
    """

    per_patch: float
    per_patch_pair: float
    per_token: float
    per_token_pair: float
    per_label: float

    @classmethod
    def of_network(
        cls,
        *,
        vision_params: int,
        adapter_params: int,
        active_params: int,
        vision_layers: int,
        vision_width: int,
        downsample: int,
        language_layers: int,
        language_attention_width: int,
        language_width: int,
        vocab_size: int,
    ) -> FlopModel:
        """Coefficients from counts.

        Args:
            vision_params: of the tower; its position table is counted as if it multiplied (0.2 %).
            adapter_params: of the adapter, which runs once per downsample x downsample patches.
            active_params: of the decoder that one token visits, without embedding and output layer.
            vision_width: of a patch vector.
            language_attention_width: query heads x head width.
        """
        return cls(
            per_patch=2.0 * vision_params + 2.0 * adapter_params / downsample**2,
            per_patch_pair=4.0 * vision_layers * vision_width,
            per_token=2.0 * active_params,
            per_token_pair=4.0 * language_layers * language_attention_width,
            per_label=2.0 * language_width * vocab_size,
        )

    def cost(self, num_tokens: int, patches: Sequence[int], num_labels: int = 0) -> Cost:
        """Forward FLOPs of one sample.

        Args:
            num_tokens: of the whole sample, visual tokens included; attention is causal in it.
            patches: of each tile or image; patches see all others of the same one.
            num_labels: tokens that carry a loss.
        """
        vision = sum(self.per_patch * n + self.per_patch_pair * n * n for n in patches)
        pairs = num_tokens * (num_tokens + 1) / 2
        language = self.per_token * num_tokens + self.per_token_pair * pairs
        return Cost(vision, language + self.per_label * num_labels)
