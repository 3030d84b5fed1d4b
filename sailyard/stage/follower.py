"""A rank other than 0: runs the stage's entry beside rank 0, and leaves every record to it."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sailyard.processes import die_with_parent
from sailyard.stage.checkpoints import Checkpoints
from sailyard.stage.context import StageContext
from sailyard.stage.errors import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_RESUME,
    RankDone,
    StageError,
    StopRequested,
)
from sailyard.stage.runner import Stop, load_entry, stop_signal

if TYPE_CHECKING:
    from sailyard.pipeline import Stage
    from sailyard.runs import Run
    from sailyard.stage.ranks import Rank
    from sailyard.yard import Yard

POLL_SECONDS = 0.2


class SilentRecorder:
    """Rank 0 reports for all."""

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def progress(self, done: int, total: int, note: str) -> None:
        """Nothing."""


def follow(yard: Yard, run: Run, stage: Stage, rank: Rank) -> int:
    """Run the entry as one of several ranks; the exit codes are those of ``runner.execute``.

    A stage that is not declared ``distributed`` is rank 0's alone.
    """
    die_with_parent(os.getppid())
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, force=True)
    if not stage.distributed:
        return EXIT_OK
    with stop_signal() as stop:
        try:
            key = _begun(yard, run, stage, stop)
            return EXIT_OK if key is None else _run_entry(yard, run, stage, rank, key, stop)
        except (StopRequested, KeyboardInterrupt):
            return EXIT_RESUME
        except Exception:
            print(yard.redact(f"rank {rank.number}: {traceback.format_exc()}"), flush=True)
            return EXIT_FAILED


def _begun(yard: Yard, run: Run, stage: Stage, stop: Stop) -> str | None:
    """Wait until rank 0 has begun; the cache key, or None when there is nothing left to do."""
    from sailyard.runs import stage_result

    # Should rank 0 not begin at all, torchrun ends this process.
    while True:
        result = stage_result(run.id, stage.name, yard)
        if result is not None and result.status == "running":
            return result.cache_key
        if result is not None and result.finished:
            return None
        if stop.requested.wait(POLL_SECONDS):
            raise StopRequested


def _run_entry(yard: Yard, run: Run, stage: Stage, rank: Rank, key: str, stop: Stop) -> int:
    from sailyard import runs

    inputs = runs.results_of(yard, run).input_digests(stage)
    work = yard.folder("work") / f"{run.id}.{stage.name}.rank{rank.number}"
    shutil.rmtree(work, ignore_errors=True)
    context = StageContext(
        stage=stage,
        recipe=run.recipe,
        run_id=run.id,
        key=key,
        input_digests=inputs,
        fetch_input=lambda name: yard.artifacts.fetch(inputs[name]),
        stream_input=lambda name: yard.artifacts.stream(inputs[name]),
        work=work,
        checkpoints=Checkpoints(yard.store, key, work / "resume"),
        recorder=SilentRecorder(),
        open_registry=lambda: yard.registry,
        open_artifacts=lambda: yard.artifacts,
    )
    started = time.monotonic()
    try:
        with stop.of(context):
            load_entry(stage.entry)(context)
        raise StageError(
            f"{stage.name} is declared distributed, but its entry ran to its end on rank "
            f"{rank.number}: what follows the training is rank 0's alone"
        )
    except RankDone:
        print(f"rank {rank.number}: done after {time.monotonic() - started:.1f} s", flush=True)
        return EXIT_OK
    finally:
        shutil.rmtree(work, ignore_errors=True)
