"""Cut a reply into reasoning and answer while it is still being written.

The released models write ``<think>...</think>`` and then the answer (spec 2.6); both tags are
ordinary text, so they arrive in any number of pieces and next to anything. The splitter keeps
back only what may still turn out to be part of a tag or white space at an edge, so a stream
shows each piece as early as it can, and the pieces joined equal the split of the whole text.
"""

from __future__ import annotations

from typing import NamedTuple

from model.chat import THINK_END, THINK_START


class Delta(NamedTuple):
    """One step of a reply; either part may be empty."""

    reasoning: str = ""
    content: str = ""


class ThinkSplitter:
    """Feed pieces of a reply, get its reasoning and its content apart.

    White space around the reasoning and before the content is layout of the format and is
    dropped. A block that never closes is reasoning to the end; a closing tag without an opening
    one is content. Several blocks are joined by a newline.
    """

    def __init__(self) -> None:
        self._held = ""
        self._inside = False
        self._started = {True: False, False: False}
        self._reasoned = False

    def feed(self, piece: str) -> Delta:
        """Add the next piece of the reply and return what is now certain."""
        self._held += piece
        reasoning: list[str] = []
        content: list[str] = []
        while True:
            tag = THINK_END if self._inside else THINK_START
            before, found, after = self._held.partition(tag)
            out = reasoning if self._inside else content
            if not found:
                ready = len(self._held) - self._undecided(tag)
                out.append(self._take(self._held[:ready]))
                self._held = self._held[ready:]
                return Delta("".join(reasoning), "".join(content))
            out.append(self._take(before.rstrip() if self._inside else before))
            self._held = after
            self._inside = not self._inside
            if self._inside:
                self._reasoned = self._reasoned or self._started[True]
                self._started[True] = False

    def close(self) -> Delta:
        """The reply is over: whatever was kept back is text after all."""
        rest, self._held = self._held, ""
        if self._inside:
            return Delta(reasoning=self._take(rest.rstrip()))
        return Delta(content=self._take(rest))

    @property
    def inside(self) -> bool:
        """Whether the reply is in the middle of a think block."""
        return self._inside

    def _take(self, text: str) -> str:
        if not self._started[self._inside]:
            text = text.lstrip()
            if not text:
                return ""
            self._started[self._inside] = True
            if self._inside and self._reasoned:
                return "\n" + text
        return text

    def _undecided(self, tag: str) -> int:
        """How many characters at the end may still become a tag or droppable white space."""
        held = self._held
        for size in range(min(len(tag) - 1, len(held)), 0, -1):
            if held.endswith(tag[:size]):
                break
        else:
            size = 0
        if self._inside:
            body = held[: len(held) - size]
            size += len(body) - len(body.rstrip())
        return size


def split(text: str) -> Delta:
    """Reasoning and content of a whole reply."""
    splitter = ThinkSplitter()
    first, last = splitter.feed(text), splitter.close()
    return Delta(first.reasoning + last.reasoning, first.content + last.content)
