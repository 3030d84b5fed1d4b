"""One loaded model and the thread that writes its replies.

Requests wait in a bounded queue; between two tokens the thread lets waiting ones join the batch
and finished or cancelled ones leave it. Streaming and whole replies take the same path, so one
long stream never holds up the others.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from model.processor import Encoded
from serving.batch import Batch
from serving.reply import FinishReason, Reply, Sampling

log = logging.getLogger(__name__)


class QueueFull(RuntimeError):
    """More requests are waiting than the server takes."""


class EngineClosed(RuntimeError):
    """This engine takes no new requests: another version has taken its place."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What the engine tells about a reply.

    Attributes:
        text: New text, may be empty.
        num_tokens: Tokens written so far.
        finish: Set on the last piece.
        error: Set instead of `finish` when the model failed.
    """

    text: str
    num_tokens: int
    finish: FinishReason | None = None
    error: str | None = None

    @property
    def last(self) -> bool:
        """Nothing comes after this piece."""
        return self.finish is not None or self.error is not None


@dataclass(slots=True)
class Ticket:
    """A request inside the engine."""

    encoded: Encoded
    sampling: Sampling
    emit: Callable[[Piece], None]
    reply: Reply
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """The client is gone: leave the batch before the next token. Emits nothing more."""
        self.cancelled.set()


class Engine:
    """A model being served.

    Args:
        model: In evaluation mode, as `model.checkpoint.load_model` gives it.
        decode: ids -> text, special tokens of answers kept.
        end_ids: Ids that end a reply.
        never: Ids that a reply must not hold.
        max_batch: Rows written at the same time.
        max_queue: Requests that may wait.
    """

    def __init__(
        self,
        model: Any,
        decode: Callable[[Sequence[int]], str],
        end_ids: frozenset[int],
        *,
        never: Iterable[int] = (),
        max_batch: int,
        max_queue: int,
    ) -> None:
        self._batch = Batch(model, never)
        self._decode, self._end_ids = decode, end_ids
        self._max_batch, self._max_queue = max_batch, max_queue
        self._waiting: deque[Ticket] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, encoded: Encoded, sampling: Sampling, emit: Callable[[Piece], None]) -> Ticket:
        """Queue a request. `emit` is called from the engine's thread and must not block.

        Raises:
            QueueFull: Too many are waiting.
            EngineClosed: Ask the engine of the new version.
        """
        reply = Reply(self._decode, self._end_ids, sampling)
        ticket = Ticket(encoded, sampling, emit, reply)
        with self._wake:
            if self._closing:
                raise EngineClosed("this version is leaving")
            if len(self._waiting) >= self._max_queue:
                raise QueueFull(f"{len(self._waiting)} requests are waiting already")
            self._waiting.append(ticket)
            self._wake.notify()
        return ticket

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Replies being written."""
        return len(self._batch.rows)

    @property
    def alive(self) -> bool:
        """The thread runs."""
        return self._thread.is_alive()

    def close(self, timeout: float | None = None) -> bool:
        """Take nothing new, finish everything that was taken; True when all of it is done."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._batch.rows:
                    if self._closing:
                        return
                    self._wake.wait()
            self._leave()
            self._admit()
            if self._batch.rows:
                self._advance()

    def _admit(self) -> None:
        # One prompt a token: reading prompts must not stall the replies that are on their way.
        # With nothing on its way the batch fills at once.
        room = self._max_batch - len(self._batch.rows)
        for _ in range(min(room, 1) if self._batch.rows else room):
            with self._wake:
                if not self._waiting:
                    return
                ticket = self._waiting.popleft()
            if ticket.cancelled.is_set():
                continue
            try:
                token = self._batch.join(ticket, ticket.encoded, ticket.sampling)
            except Exception as error:  # one prompt's failure is one request's error
                log.exception("a prompt could not be read")
                ticket.emit(Piece("", 0, error=f"{type(error).__name__}: {error}"))
                continue
            self._tell(ticket, token)
            self._leave()

    def _advance(self) -> None:
        try:
            tokens = self._batch.step()
        except Exception as error:  # the batch is lost, the server is not
            log.exception("a step failed")
            for row in self._batch.rows:
                row.owner.emit(
                    Piece("", row.owner.reply.num_tokens, error=f"{type(error).__name__}: {error}")
                )
            self._batch.keep([])
            return
        for row, token in zip(self._batch.rows, tokens, strict=True):
            self._tell(row.owner, token)
        self._leave()

    def _tell(self, ticket: Ticket, token: int) -> None:
        text = ticket.reply.push(token)
        ticket.emit(Piece(text, ticket.reply.num_tokens, ticket.reply.finish))

    def _leave(self) -> None:
        self._batch.keep(
            [
                index
                for index, row in enumerate(self._batch.rows)
                if row.owner.reply.finish is None and not row.owner.cancelled.is_set()
            ]
        )
