"""Runs one entry by hand: `python -m tests.training.run_entry STAGE FOLDER INPUTS SETTING...`.

A process of its own, so that a test can kill it as a machine would, or several under torchrun.
Like a stage it ends with 75 when it was asked to stop and has saved. Its store is a folder beside
the rest, or what SAILYARD_STORE names.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sailyard.recipe import load_recipe
from sailyard.settings import Settings
from sailyard.stage import EXIT_RESUME, MemoryRecorder, Rank, RankDone, StageContext, StopRequested


def context(
    stage: str, folder: Path, inputs: dict[str, Path], changes: list[str], recipe: str = "micro"
) -> StageContext:
    settings = Settings(home=folder) if os.environ.get("SAILYARD_STORE") else None
    return StageContext.local_context(folder, load_recipe(recipe, changes), stage, inputs, settings)


def hold(ctx: StageContext, steps: int) -> None:
    """Have the run wait to be ended, `steps` steps after its first new checkpoint.

    Whoever watches the checkpoints then finds it running, however late it looks.
    """
    save, report = ctx.checkpoints.save, ctx.metric
    latest = ctx.checkpoints.resume_point
    begun = latest[0] if latest is not None else 0
    saved = threading.Event()

    def save_and_tell(step: int, *rest: Any) -> None:
        save(step, *rest)
        # AdaLRS goes back: a step that is saved again is nothing new to see.
        if step > begun:
            saved.set()

    def report_and_wait(step: int, **values: float) -> None:
        nonlocal steps
        report(step, **values)
        steps -= saved.is_set()
        while steps < 0 and not ctx.stop_requested:
            time.sleep(0.01)

    ctx.checkpoints.save = save_and_tell  # type: ignore[assignment,method-assign]
    ctx.metric = report_and_wait  # type: ignore[method-assign]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage")
    parser.add_argument("folder", type=Path)
    parser.add_argument("inputs", type=json.loads)
    parser.add_argument("changes", nargs="*")
    parser.add_argument("--recipe", default="micro")
    parser.add_argument("--hold", type=int, help="for a run that will be ended, see `hold`")
    options = parser.parse_args(argv)
    paths = {name: Path(path) for name, path in options.inputs.items()}
    ctx = context(options.stage, options.folder, paths, options.changes, options.recipe)
    signal.signal(signal.SIGTERM, lambda *_: ctx.request_stop())
    if options.hold is not None:
        hold(ctx, options.hold)
    module, _, function = ctx.stage.entry.partition(":")
    try:
        getattr(importlib.import_module(module), function)(ctx)
    except RankDone:
        return
    except StopRequested:
        sys.exit(EXIT_RESUME)
    if Rank.from_environment().number == 0:
        figures = json.dumps(ctx.summary_values)
        (options.folder / "summary.json").write_text(figures, encoding="utf-8")
        assert isinstance(ctx.recorder, MemoryRecorder)
        points = json.dumps(ctx.recorder.points)
        (options.folder / "points.json").write_text(points, encoding="utf-8")


if __name__ == "__main__":
    main()
