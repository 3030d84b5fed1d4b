"""Names that follow from content: the cache key of a stage and its seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sailyard.pipeline import ALWAYS_READABLE, Stage
from sailyard.stage.errors import StageError

if TYPE_CHECKING:
    from sailyard.recipe import Recipe


def resolve_section(recipe: Recipe, path: str) -> Any:
    """The recipe's value at a dotted path, as the recipe holds it.

    Raises:
        StageError: The recipe has no such field.
    """
    value: Any = recipe
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif hasattr(value, part):
            value = getattr(value, part)
        else:
            raise StageError(f"the recipe has no section {path!r}: {part!r} is not there")
    return value


def may_read(stage: Stage, path: str) -> bool:
    """Whether the stage declared the path, or a section that contains it."""
    declared = (*stage.sections, *ALWAYS_READABLE)
    return any(path == section or path.startswith(section + ".") for section in declared)


def cache_key(stage: Stage, recipe: Recipe, input_digests: Mapping[str, str]) -> str:
    """Identity of a stage's result (64 hex digits).

    sha256 over the stage's name and code version, the recipe sections it declared, the seed
    and the digests of its inputs: everything the result may depend on, and nothing else.
    """
    paths = sorted({*stage.sections, "seed"})
    identity = {
        "stage": stage.name,
        "version": stage.version,
        "sections": {path: plain(resolve_section(recipe, path)) for path in paths},
        "inputs": {name: input_digests[name] for name in sorted(stage.inputs)},
    }
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def stage_seed(recipe_seed: int, stage_name: str) -> int:
    """A seed in [0, 2**31) that differs between stages and never changes for one."""
    digest = hashlib.sha256(f"{recipe_seed}:{stage_name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF


def plain(value: Any) -> Any:
    """A recipe value as JSON types."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
