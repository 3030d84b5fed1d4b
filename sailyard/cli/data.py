"""``sailyard ingest``: look a user's data over before a run does."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from sailyard.cli.output import console, print_json, print_table

# Curation stands above this package, so its reader is named here and not imported.
READER = "curation.ingest"

EXAMPLES_PER_REASON = 5


def ingest(
    path: Annotated[Path, typer.Argument(help="Folder or file with images, tables, videos.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read your own data as a run would: what is taken in, what is quarantined, and why.

    Nothing is stored. Exit status 1 if not one item can be used.
    """
    try:
        scan = importlib.import_module(READER).scan
    except ModuleNotFoundError as error:
        raise ValueError(
            f"reading data needs {error.name!r}: pip install 'sailyard[train]', then try again"
        ) from None
    outcome = _count(scan(path), path, quiet=as_json)
    if as_json:
        print_json(outcome)
    else:
        _print(outcome)
    if not outcome["accepted"]:
        raise typer.Exit(1)


def _count(items: Iterable[Any], path: Path, quiet: bool) -> dict[str, Any]:
    from sailyard.samples import Sample  # brings pyarrow, which no other command needs

    tasks: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    examples: dict[str, list[dict[str, str]]] = {}
    num_images = num_videos = 0
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=quiet, transient=True) as bars:
        bar = bars.add_task("reading")
        for item in items:
            if isinstance(item, Sample):
                tasks[item.task] += 1
                num_videos += item.is_video
                num_images += 0 if item.is_video else len(item.images)
            else:
                reasons[item.reason] += 1
                few = examples.setdefault(item.reason, [])
                if len(few) < EXAMPLES_PER_REASON:
                    few.append({"name": item.name, "detail": item.detail})
            done = f"{tasks.total()} taken in, {reasons.total()} quarantined"
            bars.update(bar, description=done)
    return {
        "path": str(path),
        "accepted": tasks.total(),
        "images": num_images,
        "videos": num_videos,
        "tasks": dict(tasks.most_common()),
        "quarantined": reasons.total(),
        "reasons": dict(reasons.most_common()),
        "examples": examples,
    }


def _print(outcome: dict[str, Any]) -> None:
    console.print(
        f"{outcome['accepted']} items can be used: {outcome['images']} images, "
        f"{outcome['videos']} videos"
    )
    rows = [
        (reason, count, outcome["examples"][reason][0]["name"])
        for reason, count in outcome["reasons"].items()
    ]
    if rows:
        title = f"{outcome['quarantined']} items would be quarantined"
        print_table(title, ("reason", "items", "for example"), rows)
    if outcome["accepted"]:
        console.print(
            f"use them with: sailyard run --data {outcome['path']}", markup=False, soft_wrap=True
        )
