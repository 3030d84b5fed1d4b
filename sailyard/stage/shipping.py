"""A stage's log, copied to the store while it grows."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING

from sailyard.runs import log_key

if TYPE_CHECKING:
    from sailyard.yard import Yard

SHIP_SECONDS = 3.0
"""How often a growing log is copied."""

# Of a log that grows beyond this, the middle is dropped: how it began and how it ended matter.
HEAD_BYTES = 1 << 20
TAIL_BYTES = 4 << 20


class LogShipper:
    """Collects lines and ships them from a thread, so a slow store never holds a stage up."""

    def __init__(self, yard: Yard, run_id: str, stage_name: str) -> None:
        self._yard = yard
        self._key = log_key(run_id, stage_name)
        self._lock = threading.Lock()
        self._head = bytearray()
        self._tail = bytearray()
        self._dropped = 0
        self._dirty = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="log", daemon=True)
        self._thread.start()

    def add(self, text: str) -> None:
        """Take a line in; it is free of secrets already."""
        line = text.encode(errors="replace")
        with self._lock:
            self._dirty = True
            if not self._tail and len(self._head) + len(line) <= HEAD_BYTES:
                self._head += line
                return
            self._tail += line
            # Cut rarely and by a lot, or every line would move megabytes.
            if len(self._tail) > 2 * TAIL_BYTES:
                surplus = len(self._tail) - TAIL_BYTES
                self._dropped += surplus
                del self._tail[:surplus]

    def close(self) -> None:
        """Ship what is left."""
        self._end.set()
        self._thread.join()

    def _work(self) -> None:
        self._take_up_earlier()
        while not self._end.wait(SHIP_SECONDS):
            self._ship()
        self._ship()

    def _take_up_earlier(self) -> None:
        """Earlier attempts of the stage in this run wrote to the same log."""
        try:
            if self._yard.store.exists(self._key):
                earlier = self._yard.store.get(self._key)[-HEAD_BYTES:]
                with self._lock:
                    self._head[:0] = earlier
        except Exception as error:
            self._complain(error)

    def _ship(self) -> None:
        with self._lock:
            if not self._dirty:
                return
            gap = b"\n[... %d bytes left out ...]\n" % self._dropped if self._dropped else b""
            text = bytes(self._head) + gap + bytes(self._tail)
            self._dirty = False
        try:
            self._yard.store.put(self._key, text)
        except Exception as error:
            with self._lock:
                self._dirty = True
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        text = self._yard.redact(f"the log could not be copied to the store: {error}\n")
        with contextlib.suppress(OSError):
            os.write(2, text.encode(errors="replace"))
