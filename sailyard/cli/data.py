"""``sailyard ingest``: look a user's data over before a run does."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from sailyard.cli.output import console, print_json, print_table

# Curation stands above this package, so it is named here and not imported.
CHECKER = "curation.ingest"


def ingest(
    path: Annotated[Path, typer.Argument(help="Images with captions, Parquet, a tar, videos.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check your own data: what can be read, what would be quarantined, and why."""
    if not path.exists():
        raise ValueError(f"there is nothing at {path}")
    raise NotImplementedError
