"""One reply in the making: from token ids to text, stop strings, when it is over. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]

# A token that is not valid UTF-8 on its own waits for its neighbours; a character needs at most
# four bytes, so after that many tokens the bytes are simply broken and shown as such.
_LONGEST_CHARACTER = 4


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one reply is drawn.

    Attributes:
        max_tokens: Most tokens to write, >= 1.
        temperature: 0 = greedy.
        top_p: Share of probability mass kept, (0, 1].
        seed: Same seed and prompt, same reply; None draws a fresh one.
        stops: Strings that end the reply and are left out of it.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()


class Reply:
    """Turns sampled ids into text pieces.

    Args:
        decode: ids -> text; special tokens that belong to an answer (boxes) must survive it.
        end_ids: Ids that end a reply.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], end_ids: frozenset[int], sampling: Sampling
    ) -> None:
        self._decode, self._end_ids, self._sampling = decode, end_ids, sampling
        self._pending: list[int] = []
        self._held = ""
        self.num_tokens = 0
        self.finish: FinishReason | None = None

    def push(self, token: int) -> str:
        """Add one sampled id; returns the text that is now certain. Sets `finish` at the end."""
        self.num_tokens += 1
        if token in self._end_ids:
            self.finish = "stop"
            return self._flush()
        self._pending.append(token)
        text = self._decode(self._pending)
        if text.endswith("\ufffd") and len(self._pending) < _LONGEST_CHARACTER:
            text = ""
        else:
            self._pending.clear()
        piece = self._through_stops(text)
        if self.finish is None and self.num_tokens >= self._sampling.max_tokens:
            self.finish = "length"
            piece += self._flush()
        return piece

    def _flush(self) -> str:
        text = self._decode(self._pending) if self._pending else ""
        self._pending.clear()
        reason, self.finish = self.finish, None
        piece = self._through_stops(text)
        if self.finish is None:  # no stop string in the last bytes: the original reason stands
            piece += self._held
            self._held, self.finish = "", reason
        return piece

    def _through_stops(self, text: str) -> str:
        stops = self._sampling.stops
        if not stops:
            return text
        self._held += text
        found = [at for stop in stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.finish = "stop"
            piece, self._held = self._held[: min(found)], ""
            return piece
        # Keep back the longest end that could still grow into a stop string.
        keep = 0
        for stop in stops:
            for size in range(min(len(stop) - 1, len(self._held)), keep, -1):
                if stop.startswith(self._held[-size:]):
                    keep = size
                    break
        cut = len(self._held) - keep
        piece, self._held = self._held[:cut], self._held[cut:]
        return piece
