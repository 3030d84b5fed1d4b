"""Which of several processes of one stage this one is, and starting them on one machine.

Ranks follow torchrun's convention: RANK, WORLD_SIZE and LOCAL_RANK in the environment. Rank 0 is
the stage as the contract knows it: it looks up, locks, publishes and records. The others only run
the entry beside it (``sailyard.stage.follower``).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from sailyard.stage.errors import EXIT_FAILED, EXIT_OK, EXIT_RESUME, StageError

if TYPE_CHECKING:
    from sailyard.pipeline import Stage
    from sailyard.runs import Run
    from sailyard.yard import Yard

GRACE_SECONDS = 600
"""How long torchrun lets ranks save after a signal; whoever sent it kills them when it will not
wait that long."""


VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True, slots=True)
class Rank:
    """One process of a stage.

    Attributes:
        number: 0 to size - 1, over all machines.
        size: Processes of the stage.
        local: Number on its own machine, from 0.
    """

    number: int = 0
    size: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Rank:
        """As torchrun sets it; a single process without it.

        Raises:
            StageError: The variables do not go together.
        """
        values = [environment.get(name) for name in VARIABLES]
        if values == [None] * 3:
            return cls()
        try:
            rank = cls(*(int(value or "") for value in values))
        except ValueError:
            rank = cls(-1)
        if not 0 <= rank.local <= rank.number < rank.size:
            raise StageError(
                f"RANK, WORLD_SIZE and LOCAL_RANK are {', '.join(map(str, values))}; start several "
                "processes with torchrun, or unset the three for one"
            )
        return rank


def be_alone() -> None:
    """Forget the other ranks: in a stage of rank 0's alone they have left already."""
    for name in VARIABLES:
        os.environ.pop(name, None)


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
