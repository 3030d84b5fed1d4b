"""Every field of the recipe by dotted path: for documentation and for guessing typos."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sailyard.recipe.base import RecipeError, Section
from sailyard.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True)
class FieldDoc:
    """One line of the recipe's reference."""

    path: str
    type: str
    default: str
    doc: str


@cache
def field_paths() -> dict[str, FieldInfo]:
    """Dotted path -> field, for every field a recipe can hold, sections included."""
    return dict(_walk(Recipe, ""))


def _walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        yield path, field
        section = _section_of(field)
        if section is not None:
            yield from _walk(section, f"{path}.")


def _section_of(field: FieldInfo) -> type[Section] | None:
    """The section a field holds, also when it may be null."""
    # A stage's default can be a subclass of what the annotation says.
    default = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(default, Section):
        return type(default)
    for candidate in (field.annotation, *typing.get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            # A list of sections has no dotted paths of its own.
            return candidate if typing.get_origin(field.annotation) is not list else None
    return None


def is_open_path(path: str) -> bool:
    """Whether a path names a key inside a free mapping, such as ``...weights.captions``."""
    parent, _, key = path.rpartition(".")
    field = field_paths().get(parent)
    return bool(key) and field is not None and typing.get_origin(field.annotation) is dict


def nearest_path(wrong: str, known: Sequence[str]) -> str | None:
    """The known name most like a wrong one, or None when nothing is near.

    Fields of the same section come first, then any field whose last parts are alike, so both a
    misspelt name and a forgotten prefix are found.
    """
    parent, _, last = wrong.rpartition(".")

    def likeness(path: str) -> float:
        other_parent, _, other_last = path.rpartition(".")
        names = SequenceMatcher(None, last, other_last).ratio()
        parents = SequenceMatcher(None, parent, other_parent).ratio()
        return names + (0.5 * parents if parent or other_parent else 0.5)

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) >= 0.95 else None


def get_section(recipe: Recipe, path: str) -> Any:
    """The section or value at a dotted path; RecipeError names the nearest right one."""
    value: Any = recipe
    for name in path.split("."):
        if isinstance(value, Section) and name in type(value).model_fields:
            value = getattr(value, name)
        else:
            guess = nearest_path(path, list(field_paths()))
            hint = f"; did you mean {guess}?" if guess else ""
            raise RecipeError(f"the recipe has no {path}{hint}")
    return value


def field_docs() -> list[FieldDoc]:
    """The reference of the recipe: path, type, default and what the number is, by field."""
    recipe = Recipe()
    docs = []
    for path, field in field_paths().items():
        if _section_of(field) is not None and not _may_be_null(field):
            shown = ""
        else:
            shown = _show(_value(recipe, path, field))
        docs.append(
            FieldDoc(path, _type_name(field), shown, " ".join((field.description or "").split()))
        )
    return docs


def recipe_json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, for editors."""
    return Recipe.model_json_schema()


def _may_be_null(field: FieldInfo) -> bool:
    return type(None) in typing.get_args(field.annotation)


def _value(recipe: Recipe, path: str, field: FieldInfo) -> Any:
    value: Any = recipe
    for name in path.split("."):
        if value is None:  # inside a section that is null by default
            return field.get_default(call_default_factory=True, validated_data={})
        value = getattr(value, name)
    return value


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _type_name(field: FieldInfo) -> str:
    annotation = field.annotation
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    if isinstance(annotation, types.UnionType):
        return " | ".join(getattr(arm, "__name__", str(arm)) for arm in typing.get_args(annotation))
    return str(annotation).replace("typing.", "")
