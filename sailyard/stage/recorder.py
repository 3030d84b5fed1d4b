"""Where a running stage's metric points and progress go."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Protocol, TextIO


class Recorder(Protocol):
    """Takes what a stage reports while it runs. Calls return at once."""

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        """Points of several series at one step."""

    def progress(self, done: int, total: int, note: str) -> None:
        """How far the stage is."""


class MemoryRecorder:
    """Keeps everything in lists; for tests of an entry."""

    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []
        self.progress_calls: list[tuple[int, int, str]] = []

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        """Append to ``points``."""
        self.points.append((step, dict(values)))

    def progress(self, done: int, total: int, note: str) -> None:
        """Append to ``progress_calls``."""
        self.progress_calls.append((done, total, note))

    def series(self, name: str) -> list[tuple[int, float]]:
        """Points of one series as (step, value)."""
        return [(step, values[name]) for step, values in self.points if name in values]


class ProgressLines:
    """Progress as log lines, at most one every few seconds, and always the last."""

    def __init__(self, stage_name: str, stream: TextIO | None = None, every: float = 5.0) -> None:
        self._stage_name = stage_name
        self._stream = stream
        self._every = every
        self._next = 0.0
        self._started = time.monotonic()

    def show(self, done: int, total: int, note: str) -> None:
        """Print a line when one is due."""
        now = time.monotonic()
        if now < self._next and done < total:
            return
        self._next = now + self._every
        share = f" {done / total:4.0%}" if total > 0 else ""
        left = self._time_left(done, total, now)
        text = f"{self._stage_name} {done}/{total}{share}{left}{'  ' + note if note else ''}"
        print(text, file=self._stream or sys.stdout, flush=True)

    def _time_left(self, done: int, total: int, now: float) -> str:
        if not 0 < done < total:
            return ""
        seconds = (now - self._started) / done * (total - done)
        return f"  {seconds:.0f} s left" if seconds < 600 else f"  {seconds / 60:.0f} min left"
