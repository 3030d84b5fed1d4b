"""The next step's batch is made while this step trains."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from training.stream import PackedStream, StreamBatch


class Prefetch:
    """A packed stream one batch ahead; its state is that of what was taken, not of what was made.

    One thread makes batches, so they are the same and in the same order as without it. Reading,
    decoding and planning hold no lock for most of their time (pillow, tokenizers and numpy are
    native code), so a step on an accelerator hides them.
    """

    def __init__(self, stream: PackedStream) -> None:
        self._stream = stream
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._ahead: Future[tuple[StreamBatch, dict[str, Any]]] | None = None
        self._state = stream.state()

    def next_batch(self) -> StreamBatch:
        """The stream's next batch; raises what making it raised."""
        ahead = self._ahead or self._thread.submit(self._make)
        batch, self._state = ahead.result()
        self._ahead = self._thread.submit(self._make)
        return batch

    def state(self) -> dict[str, Any]:
        """Position behind the last batch taken, as `PackedStream.state`."""
        return self._state

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; a batch that was made ahead is dropped."""
        self._drop()
        self._stream.load(state)
        self._state = self._stream.state()

    def close(self) -> None:
        """End the thread and the stream."""
        self._drop()
        self._thread.shutdown()
        self._stream.close()

    def _make(self) -> tuple[StreamBatch, dict[str, Any]]:
        return self._stream.next_batch(), self._stream.state()

    def _drop(self) -> None:
        if self._ahead is not None:
            self._ahead.cancel()
            # What is being made cannot be stopped; its stream must not be touched before its end.
            self._thread.submit(lambda: None).result()
            self._ahead = None
