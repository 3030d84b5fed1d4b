"""Workers for test_spread, in a module of their own: what it imports, every worker imports."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from curation.spread import Batch, Batches, spread
from sailyard.samples import SampleReader
from sailyard.stage.errors import EXIT_RESUME, StopRequested
from sailyard.stage.runner import stop_signal


class Ids:
    """Works on batches of samples, says where, and meets with accidents when told to."""

    def __init__(self, die_at: int = -1, refuse_at: int = -1, notes: Path | None = None) -> None:
        self.die_at, self.refuse_at, self.notes = die_at, refuse_at, notes

    def __call__(self, batch: Batch) -> tuple[int, list[str]]:
        if batch.start == self.refuse_at:
            raise ValueError(f"sample {batch.samples[0].id} is beyond me")
        if batch.start == self.die_at and not (self.notes and self.notes.exists()):
            if self.notes:
                self.notes.touch()
            time.sleep(0.5)  # or the result before is lost with it, and that item is tried again
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
        return os.getpid(), [sample.id for sample in batch.samples]


def broken() -> Ids:
    """A worker whose files are not what they should be."""
    raise ValueError("no judges here")


class Context:
    """What a stop is told to, of a stage that keeps no checkpoints."""

    class stage:
        resumable = False

    def request_stop(self) -> None:
        pass


def main(dataset: str) -> int:
    """Work on a dataset as a stage's process does, telling where, until asked to stop."""
    reader = SampleReader(Path(dataset))
    positions = [*range(len(reader))] * 100  # minutes of work: a request that is late is in time
    with stop_signal() as stop:
        try:
            with stop.of(Context()):  # type: ignore[arg-type]
                for pid, _ in spread(Batches(reader, positions, 1), Ids):
                    print(pid, flush=True)
        except StopRequested:
            return EXIT_RESUME
    return 0


if __name__ == "__main__":
    # Under its own name, so that workers find the classes above.
    from tests.curation import spread_workers

    sys.exit(spread_workers.main(sys.argv[1]))
