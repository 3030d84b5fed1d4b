"""Runs one entry by hand: `python -m tests.training.run_entry STAGE FOLDER INPUTS SETTING...`.

A process of its own, so that a test can kill it as a machine would.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from sailyard.recipe import load_recipe
from sailyard.stage import StageContext


def context(stage: str, folder: Path, inputs: dict[str, Path], changes: list[str]) -> StageContext:
    return StageContext.local_context(folder, load_recipe("micro", changes), stage, inputs)


def main() -> None:
    stage, folder, inputs, *changes = sys.argv[1:]
    paths = {name: Path(path) for name, path in json.loads(inputs).items()}
    ctx = context(stage, Path(folder), paths, changes)
    module, _, function = ctx.stage.entry.partition(":")
    getattr(importlib.import_module(module), function)(ctx)
    (Path(folder) / "summary.json").write_text(json.dumps(ctx.summary_values), encoding="utf-8")


if __name__ == "__main__":
    main()
