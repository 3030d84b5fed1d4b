"""What every recipe section shares: strict, frozen, documented, merged over its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

Part = Literal["vision", "adapter", "language"]
"""The three parts of the network that a stage trains or freezes."""


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the dotted field and the way out."""


def deep_merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``top`` laid over it; mappings merge, everything else is replaced."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = deep_merge(below, value)
        else:
            merged[key] = value
    return merged


class Section(BaseModel):
    """A group of recipe fields.

    A stage reads sections and must not change them, so they are frozen. A field whose default
    is itself a section keeps the rest of that default when only some of it is given: a file
    that sets ``alignment.warmup.lr`` keeps that stage's batch size, not the class's.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _lay_over_defaults(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        laid = dict(given)
        for name, field in cls.model_fields.items():
            value = laid.get(name)
            if isinstance(value, Mapping):
                default = field.get_default(call_default_factory=True, validated_data={})
                if isinstance(default, Section):
                    laid[name] = deep_merge(default.model_dump(), value)
        return laid
