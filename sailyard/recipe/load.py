"""Recipes from presets, files and ``--set`` overrides, with errors that name the way out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sailyard.recipe.base import RecipeError, deep_merge
from sailyard.recipe.fields import field_paths, is_open_path, nearest_path
from sailyard.recipe.recipe import Recipe

SUFFIXES = (".yaml", ".yml")


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-5 as a number and refuses a key given twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Looked at before merge keys are resolved: those repeat keys lawfully.
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.composer.ComposerError(
                None, None, f"the key {twice!r} is given twice", node.start_mark
            )
        return node


# YAML 1.1 wants a dot in every float, so 2e-6 would be read as text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def recipes_dir() -> Path:
    """The folder of the presets, beside the packages in a checkout and when installed."""
    return Path(__file__).resolve().parents[2] / "recipes"


def preset_names() -> list[str]:
    """Names that `load_recipe` knows without a path."""
    return sorted(path.stem for path in recipes_dir().glob("*.yaml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a preset or a YAML file and lay ``a.b.c=value`` overrides over it.

    A file says only what differs from what it ``extends``, or from the paper's 2B model.
    Mappings merge; lists and values replace.

    Raises:
        RecipeError: No such recipe, unreadable YAML, an unknown field, a bad value.
    """
    path = _find(name_or_path)
    given = _read(path, ())
    given.setdefault("name", path.stem)
    for override in overrides:
        given = deep_merge(given, _parse_override(override))
    return build_recipe(given, where=str(name_or_path))


def build_recipe(given: dict[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain data, such as a stored run's; RecipeError lists every problem."""
    try:
        return Recipe.model_validate(given)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(problem)}" for problem in error.errors())
        raise RecipeError(f"recipe {where} is not usable:\n{problems}") from error


def _find(name_or_path: str) -> Path:
    if name_or_path.endswith(SUFFIXES) or "/" in name_or_path:
        path = Path(name_or_path)
        if not path.is_file():
            raise RecipeError(f"no recipe file at {path}")
        return path
    path = recipes_dir() / f"{name_or_path}.yaml"
    if not path.is_file():
        known = preset_names()
        guess = nearest_path(name_or_path, known)
        hint = f"; did you mean {guess}?" if guess else ""
        raise RecipeError(
            f"no recipe named {name_or_path!r}{hint} Presets: {', '.join(known)}; or give a path "
            "that ends in .yaml"
        )
    return path


def _read(path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    """The file's fields laid over those of the recipe it extends."""
    path = path.resolve()
    if path in below:
        chain = " -> ".join(p.stem for p in (*below, path))
        raise RecipeError(f"recipes extend each other in a circle: {chain}")
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path} is not readable YAML: {error}") from error
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise RecipeError(f"{path} holds a {type(given).__name__}, a recipe is a mapping")
    parent = given.pop("extends", None)
    if parent is None:
        return given
    if not isinstance(parent, str):
        raise RecipeError(f"{path}: extends names one recipe, got {parent!r}")
    beside = path.parent / parent
    base = _read(beside if beside.is_file() else _find(parent), (*below, path))
    base.pop("name", None)
    return deep_merge(base, given)


def _parse_override(override: str) -> dict[str, Any]:
    path, equals, text = override.partition("=")
    path = path.strip()
    if not equals or not path:
        raise RecipeError(f"--set {override!r}: write it as a.b.c=value")
    if path not in field_paths() and not is_open_path(path):
        raise RecipeError(_unknown(path))
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {path}: {text!r} is not a YAML value: {error}") from error
    for name in reversed(path.split(".")):
        value = {name: value}
    return dict(value)


def _explain(problem: Any) -> str:
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return _unknown(location)
    message = problem["msg"].removeprefix("Value error, ")
    if not location:
        return str(message)
    shown = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"
    return f"{location}: {message}{shown}"


def _unknown(path: str) -> str:
    guess = nearest_path(path, list(field_paths()))
    return f"{path}: unknown field" + (f"; did you mean {guess}?" if guess else "")
