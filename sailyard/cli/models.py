"""``sailyard promote``, ``rollback`` and ``serve``."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from sailyard.cli.output import as_plain, console, print_json

Alias = Annotated[str, typer.Option(help="Alias to move.")]
Reason = Annotated[str, typer.Option(help="Why, for the record.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def promote(
    version: Annotated[str, typer.Argument(help='"name:number", "name" (newest) or a digest.')],
    alias: Alias = "production",
    reason: Reason = "",
    as_json: JSON = False,
) -> None:
    """Point an alias at a model version; the endpoint follows."""
    from sailyard.yard import Yard

    moved = Yard().registry.promote(alias, version, reason=reason)
    if as_json:
        print_json({"alias": alias, "ref": moved.ref, **as_plain(moved)})
    else:
        console.print(f"{alias} -> {moved.ref} ({moved.checkpoint[:12]})")


def rollback(alias: Alias = "production", reason: Reason = "", as_json: JSON = False) -> None:
    """Point an alias at what it pointed at before."""
    from sailyard.yard import Yard

    moved = Yard().registry.rollback(alias, reason=reason)
    if as_json:
        print_json({"alias": alias, "ref": moved.ref, **as_plain(moved)})
    else:
        console.print(f"{alias} -> {moved.ref} ({moved.checkpoint[:12]})")


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    alias: Annotated[str, typer.Option(help="Alias whose version is served.")] = "production",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Serve this checkpoint folder instead of an alias.")
    ] = None,
) -> None:
    """Serve the promoted version over an OpenAI-compatible API."""
    missing = [name for name in ("torch", "fastapi", "uvicorn") if not _installed(name)]
    if missing:
        raise ValueError(
            f"serving needs {', '.join(missing)}: pip install 'sailyard[serve]', then try again"
        )
    command = [sys.executable, "-m", "serving", "--host", host, "--port", str(port)]
    if checkpoint is not None:
        command += ["--checkpoint", str(checkpoint)]
    else:
        command += ["--alias", alias]
    # The server takes this process over: signals reach it, and its exit status is ours.
    sys.stdout.flush()
    os.execv(sys.executable, command)


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
