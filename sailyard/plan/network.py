"""A network as a plan sees it: counts and widths, no tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from sailyard.plan.flops import FlopModel
from sailyard.recipe import ModelShape

PARTS = ("vision", "adapter", "language")
"""In the order of the forward pass."""


class Counted(Protocol):
    """What `model.counting.count_recipe` gives: parameters, counted on the network itself."""

    @property
    def vision(self) -> int: ...
    @property
    def adapter(self) -> int: ...
    @property
    def language(self) -> int: ...
    @property
    def tied(self) -> int: ...
    @property
    def experts(self) -> int: ...
    @property
    def active_without_embeddings(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Network:
    """Shape from the recipe, parameters from the count."""

    shape: ModelShape
    counted: Counted

    @property
    def total(self) -> int:
        """Distinct parameters."""
        return sum(self.params(part) for part in PARTS)

    def params(self, part: str) -> int:
        """Parameters of one part."""
        return int(getattr(self.counted, part))

    @property
    def routers(self) -> int:
        """Parameters of all routers."""
        language = self.shape.language
        if language.moe is None:
            return 0
        return language.num_layers * language.moe.num_experts * language.hidden_size

    @property
    def query_width(self) -> int:
        """Query heads x head width."""
        return self.shape.language.num_heads * self.shape.language.head_dim

    @property
    def key_width(self) -> int:
        """Key heads x head width."""
        return self.shape.language.num_kv_heads * self.shape.language.head_dim

    @property
    def largest_block(self) -> int:
        """Parameters of the largest piece that ZeRO-3 gathers at once: a layer or the embedding."""
        language = self.shape.language
        table = language.vocab_size * language.hidden_size
        tables = table * (1 if language.tie_word_embeddings else 2)
        layer = (self.counted.language - tables) // language.num_layers
        return max(table, layer)

    def flop_model(self) -> FlopModel:
        """Coefficients of a forward pass."""
        vision, language = self.shape.vision, self.shape.language
        return FlopModel.of_network(
            vision_params=self.counted.vision,
            adapter_params=self.counted.adapter,
            active_params=self.counted.active_without_embeddings,
            vision_layers=vision.num_layers,
            vision_width=vision.hidden_size,
            downsample=self.shape.downsample,
            language_layers=language.num_layers,
            language_attention_width=self.query_width,
            language_width=language.hidden_size,
            vocab_size=language.vocab_size,
        )


@dataclass(frozen=True, slots=True)
class Learning:
    """Which parts a stage trains.

    Attributes:
        parts: parts that learn; the others are frozen.
        routers_only: of the language model, only the routers learn (expert calibration).
        uses_vision: the stage looks at images at all.
    """

    parts: frozenset[str]
    routers_only: bool = False
    uses_vision: bool = True

    @classmethod
    def of(cls, parts: Iterable[str]) -> Learning:
        """A stage that trains these parts whole."""
        return cls(frozenset(parts))

    def learns(self, part: str) -> bool:
        """The part's matrices get gradients."""
        return part in self.parts and not self.routers_only

    def passes(self, part: str) -> bool:
        """A gradient runs through the part: it learns, or something before it does."""
        return any(earlier in self.parts for earlier in PARTS[: PARTS.index(part) + 1])

    def trained(self, network: Network) -> int:
        """Parameters with gradient and optimizer state."""
        if self.routers_only:
            return network.routers
        return sum(network.params(part) for part in self.parts)

    def trained_experts(self, network: Network) -> int:
        """Of those, the ones inside experts."""
        return network.counted.experts if self.learns("language") else 0
