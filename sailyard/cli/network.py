"""``sailyard model``: count a recipe's network, look a checkpoint over, change its layout."""

from __future__ import annotations

import importlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from sailyard.cli.output import as_plain, byte_size, console, print_json, print_table

model_app = typer.Typer(help="Networks and their checkpoints.", no_args_is_help=True)

JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Layout(StrEnum):
    """How tensors are named on disk."""

    released = "released"
    native = "native"


@model_app.command()
def count(
    recipe: Annotated[str, typer.Option(help="Preset name or path of a YAML file.")] = "tiny",
    as_json: JSON = False,
) -> None:
    """Count a recipe's parameters by part, without weights or downloads."""
    from sailyard.recipe import load_recipe

    section = load_recipe(recipe).model
    counted = room("model.counting").count_recipe(section)
    figures = {"distinct": counted.distinct, "stored": counted.stored, **as_plain(counted)}
    if as_json:
        num_bytes = {"bfloat16": 2 * counted.stored, "float32": 4 * counted.stored}
        print_json({"recipe": recipe, **figures, "bytes": num_bytes})
        return
    rows = [
        ("SAIL-ViT", counted.vision),
        ("adapter", counted.adapter),
        ("language model", counted.language),
        ("all, a tied output layer once", counted.distinct),
        ("stored in the released layout", counted.stored),
        ("active per text token, with embedding and output layer", counted.active),
        ("active per text token, without", counted.active_without_embeddings),
    ]
    print_table(recipe, ("what", "parameters"), [(what, f"{size:,}") for what, size in rows])
    console.print(f"released layout in bfloat16: {2 * counted.stored:,} bytes")


@model_app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="Checkpoint of either layout.")],
    as_json: JSON = False,
) -> None:
    """Say what a checkpoint holds and the first thing wrong with it; exit status 1 if any is."""
    found = room("model.inspection").inspect(directory)
    if as_json:
        print_json({"directory": str(directory), **as_plain(found)})
    else:
        rows = [("layout", found.layout or "unknown"), ("type", ", ".join(found.dtypes))]
        rows += [
            (f"{section}.{key}", value)
            for section, keys in found.config.items()
            for key, value in keys.items()
        ]
        rows += [(f"{part}, parameters", f"{size:,}") for part, size in found.values.items()]
        rows.append(("tensors", f"{found.num_tensors} in {found.num_files} files"))
        rows.append(("problem", found.problem or "none"))
        print_table(str(directory), ("what", "found"), rows)
    if found.problem:
        raise typer.Exit(1)


@model_app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint to read.")],
    target: Annotated[Path, typer.Argument(help="New directory to write.")],
    to: Annotated[Layout, typer.Option(help="Layout to write.")],
) -> None:
    """Write a checkpoint in the other layout; tensors keep their bytes and type."""
    room("model.release").convert(source, target, to.value)
    size = sum(file.stat().st_size for file in target.iterdir())
    console.print(f"{target}: {to.value} layout, {byte_size(size)}", markup=False, soft_wrap=True)


def room(name: str) -> Any:
    """A module of `model`, which stands above this package: named here, not imported."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"networks need {error.name!r}: pip install 'sailyard[serve]', then try again"
        ) from None
