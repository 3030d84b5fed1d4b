"""A stage as several processes of one machine, under torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import FrameType
from typing import TYPE_CHECKING

from sailyard.stage.errors import EXIT_FAILED, EXIT_OK, EXIT_RESUME

if TYPE_CHECKING:
    from sailyard.pipeline import Stage
    from sailyard.runs import Run
    from sailyard.yard import Yard

GRACE_SECONDS = 600
"""How long torchrun lets ranks save after a signal; whoever sent it kills them when it will not
wait that long."""


def run_ranks(yard: Yard, run: Run, stage: Stage, ranks: int, *, force: bool = False) -> int:
    """Run a stage as several processes of this machine, under torchrun; returns its exit code.

    torchrun ends with 1 however a rank ended, so the code comes from the stage's own result.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", f"--shutdown-timeout={GRACE_SECONDS}"]
    # Behind the two dashes torchrun no longer takes --run for an option of its own.
    command += ["-m", "--", "sailyard", "stage", "run", stage.name, "--run", run.id]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    environment = {**os.environ, **yard.settings.environment(), **threads}
    process = subprocess.Popen([*command, *(["--force"] if force else [])], env=environment)

    def forward(number: int, _frame: FrameType | None) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return EXIT_OK if code == EXIT_OK else _how_it_ended(yard, run, stage)


def _how_it_ended(yard: Yard, run: Run, stage: Stage) -> int:
    from sailyard.runs import stage_result

    result = stage_result(run.id, stage.name, yard)
    status = result.status if result is not None else ""
    return EXIT_RESUME if status in ("stopped", "lost") else EXIT_FAILED
