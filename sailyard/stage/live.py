"""The recorder of a real run: metric points, progress and signs of life, written in batches."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Mapping
from contextlib import suppress

from sailyard.lineage import Database, Point, records
from sailyard.stage.exposition import Exposition
from sailyard.stage.recorder import ProgressLines

log = logging.getLogger(__name__)

FLUSH_SECONDS = 2.0

# While the database is away, points wait in memory; a million of them is a few hundred MB.
MAX_WAITING = 200_000


class LiveRecorder:
    """Writes what a stage reports to lineage from a thread of its own.

    A database that is away for a while costs a training run nothing but a warning: points
    wait and go with a later batch.
    """

    def __init__(
        self,
        database: Database,
        stage_run_id: int,
        stage_name: str,
        channel: int | None,
        exposition: Exposition | None = None,
    ) -> None:
        """Args:
        channel: Pipe to the supervisor's progress bar; None prints lines instead.
        exposition: Shows the newest figures to a scraper.
        """
        self._database = database
        self._stage_run_id = stage_run_id
        self._channel = channel
        self._exposition = exposition
        self._lines = ProgressLines(stage_name)
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._points: list[Point] = []
        self._progress: tuple[int, int, str] | None = None
        self._dropped = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="lineage", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def close(self) -> None:
        """Write what is left and stop; raises what the database raises."""
        if self._exposition is not None:
            self._exposition.close()
        self._end.set()
        self._thread.join()
        self._flush()
        if self._dropped:
            log.warning("%d metric points were lost while the database was away", self._dropped)

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        """Queue points of several series at one step."""
        if self._exposition is not None:
            self._exposition.metric(values)
        with self._lock:
            if len(self._points) >= MAX_WAITING:
                self._dropped += len(values)
                return
            self._points += [Point(name, step, value) for name, value in values.items()]

    def progress(self, done: int, total: int, note: str) -> None:
        """Show progress, and keep it for the next batch."""
        if self._exposition is not None:
            self._exposition.progress(done, total)
        with self._lock:
            self._progress = (done, total, note)
        if self._channel is None:
            self._lines.show(done, total, note)
        else:
            _send(self._channel, {"done": done, "total": total, "note": note[:200]})

    def _work(self) -> None:
        silent = 0.0
        while not self._end.wait(FLUSH_SECONDS):
            silent += FLUSH_SECONDS
            waiting = bool(self._points) or self._progress is not None
            if waiting or silent >= records.HEARTBEAT_SECONDS:
                silent = 0.0
                self.flush()

    def flush(self) -> None:
        """Write now; a database that is away is worth a warning, the points stay queued."""
        try:
            self._flush()
        except Exception as error:
            log.warning("lineage is behind: %s", (str(error).splitlines() or [""])[0])

    def _flush(self) -> None:
        # One batch at a time: what a caller flushes may be in the thread's hands already.
        with self._writing:
            with self._lock:
                points, self._points = self._points, []
                progress, self._progress = self._progress, None
            try:
                records.beat(self._database, self._stage_run_id, points, progress)
            except BaseException:
                with self._lock:
                    self._points = points + self._points
                    self._progress = self._progress or progress
                raise


def _send(channel: int, message: Mapping[str, object]) -> None:
    line = json.dumps(message).encode() + b"\n"
    # Below PIPE_BUF, so whole or not at all; the pipe does not block, and a bar that misses a
    # step is no loss.
    with suppress(BlockingIOError, BrokenPipeError):
        os.write(channel, line)
