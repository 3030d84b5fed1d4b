"""The protocol that every launcher speaks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class JobState(StrEnum):
    """Where a job is."""

    WAITING = "waiting"
    """In a queue, or until a machine and an image are there: no error."""
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    INTERRUPTED = "interrupted"
    """Stopped from outside, by a signal or a lost machine: run it again and it resumes."""
    FAILED = "failed"
    """Ended with an error of its own: running it again would fail again."""


@dataclass(frozen=True)
class StageJob:
    """One execution of one stage.

    Attributes:
        stage: Name of the stage.
        run_id: Of the pipeline run it belongs to.
        force: Run the stage even where a finished result exists.
    """

    stage: str
    run_id: str
    force: bool = False


class Launcher(Protocol):
    """Starts stages somewhere and follows them. A handle is the launcher's name for a job.

    Attributes:
        detached: Jobs live on without the process that submitted them: whoever waits for one can
            do so elsewhere, or later.
    """

    detached: bool

    def submit(self, job: StageJob) -> str:
        """Start the job; returns its handle at once."""

    def status(self, handle: str) -> JobState:
        """Where the job is now."""

    def logs(self, handle: str) -> Iterator[str]:
        """Its log lines as they come, without line ends; the iterator ends when the job does."""

    def cancel(self, handle: str, grace_s: float) -> None:
        """End the job and every process it started, by force after ``grace_s`` seconds."""
