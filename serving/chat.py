"""One chat request from its JSON to its reply, whole or streamed."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from model.processor import Encoded
from serving.conversation import read_conversation
from serving.engine import Piece, QueueFull, Ticket
from serving.errors import ApiError
from serving.reply import Sampling
from serving.schema import ChatRequest
from serving.settings import ServingSettings
from serving.thinking import Delta, ThinkSplitter
from serving.versions import Served

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request the engine can take: the conversation, and how to draw."""

    encoded: Encoded
    sampling: Sampling

    @property
    def num_tokens(self) -> int:
        """Tokens of the conversation, those of its images included."""
        return len(self.encoded.input_ids)


@dataclass(slots=True)
class Exchange:
    """A prompt in the engine and what has come back."""

    served: Served
    prompt: Prompt
    ticket: Ticket
    pieces: asyncio.Queue[Piece]
    started: float
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    num_tokens: int = 0
    num_reasoning: int = 0
    finish: str | None = None
    first_token_at: float | None = None

    async def deltas(self) -> AsyncIterator[Delta]:
        """The reply as it is written, reasoning apart; empty steps are left out.

        Raises:
            ApiError: the model failed.
        """
        splitter = ThinkSplitter()
        while True:
            piece = await self.pieces.get()
            if piece.error is not None:
                raise ApiError("the model failed on this request", status=500, code="model_error")
            if self.first_token_at is None:
                self.first_token_at = time.perf_counter()
            delta = splitter.feed(piece.text)
            self.num_reasoning += piece.num_tokens - self.num_tokens if splitter.inside else 0
            self.num_tokens = piece.num_tokens
            if any(delta):
                yield delta
            if piece.last:
                self.finish = piece.finish
                if any(delta := splitter.close()):
                    yield delta
                return

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        prompt = self.prompt.num_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.num_tokens,
            "total_tokens": prompt + self.num_tokens,
            "completion_tokens_details": {"reasoning_tokens": self.num_reasoning},
        }

    def envelope(self, kind: str) -> dict[str, Any]:
        """The fields that every answer object begins with."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": self.served.digest[:12],
        }


def prepare(request: ChatRequest, served: Served, settings: ServingSettings) -> Prompt:
    """Read the conversation, encode it, check it against the context. Runs in a worker thread.

    Raises:
        ApiError: see `read_conversation`; or too many tokens are asked for.
    """
    limit = request.token_limit
    if limit is not None and limit > settings.max_new_tokens:
        raise ApiError(
            f"max_tokens is {limit}, at most {settings.max_new_tokens} are written",
            code="max_tokens_too_large",
            param="max_tokens",
        )
    conversation = read_conversation(
        request.messages,
        thinking=request.chat_template_kwargs.enable_thinking,
        settings=settings,
    )
    encoded = served.processor.encode(
        conversation.messages, conversation.images, add_generation_prompt=True
    )
    num_prompt, room = len(encoded.input_ids), served.context - len(encoded.input_ids)
    if num_prompt > settings.max_prompt_tokens or room < (limit or 1):
        most = min(settings.max_prompt_tokens, served.context - (limit or 1))
        num_visual = int((encoded.input_ids == served.processor.image_token_id).sum())
        raise ApiError(
            f"the prompt has {num_prompt} tokens, {num_visual} of them for images; "
            f"with max_tokens={limit or 1} at most {most} fit",
            code="context_length_exceeded",
            param="messages",
        )
    sampling = Sampling(
        max_tokens=limit or min(settings.default_max_tokens, room),
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        stops=request.stops,
    )
    return Prompt(encoded, sampling)


def begin(prompt: Prompt, served: Served, started: float) -> Exchange:
    """Hand the prompt to the engine. Call from the event loop.

    Raises:
        ApiError: 429, too many requests are waiting.
    """
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[Piece] = asyncio.Queue()

    def emit(piece: Piece) -> None:
        try:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)
        except RuntimeError:  # the server is going down and nobody reads any more
            log.debug("a piece came after the event loop had closed")

    try:
        ticket = served.engine.submit(prompt.encoded, prompt.sampling, emit)
    except QueueFull as error:
        raise ApiError(f"{error}; try again", status=429, code="queue_full") from error
    return Exchange(served, prompt, ticket, pieces, started)


async def whole(exchange: Exchange) -> dict[str, Any]:
    """The reply as one chat.completion object."""
    reasoning, content = [], []
    async for delta in exchange.deltas():
        reasoning.append(delta.reasoning)
        content.append(delta.content)
    thought = "".join(reasoning) or None
    message = {
        "role": "assistant",
        "content": "".join(content),
        # vLLM renamed the field in 2025 and clients of both names are about.
        "reasoning": thought,
        "reasoning_content": thought,
    }
    choice = {"index": 0, "message": message, "finish_reason": exchange.finish, "logprobs": None}
    return {
        **exchange.envelope("chat.completion"),
        "choices": [choice],
        "usage": exchange.usage(),
    }


async def streamed(exchange: Exchange, include_usage: bool) -> AsyncIterator[str]:
    """The reply as server-sent events: role, deltas, finish reason, usage if asked, [DONE]."""

    def event(delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        chunk = {**exchange.envelope("chat.completion.chunk"), "choices": [choice]}
        if include_usage:
            chunk["usage"] = None
        return _sse(chunk)

    yield event({"role": "assistant", "content": ""})
    try:
        async for delta in exchange.deltas():
            if delta.reasoning:
                yield event({"reasoning": delta.reasoning, "reasoning_content": delta.reasoning})
            if delta.content:
                yield event({"content": delta.content})
    except ApiError as error:  # the status line is long gone; clients look for this object
        yield _sse(error.body())
        return
    yield event({}, exchange.finish)
    if include_usage:
        chunk = {**exchange.envelope("chat.completion.chunk"), "choices": []}
        yield _sse({**chunk, "usage": exchange.usage()})
    yield "data: [DONE]\n\n"


def _sse(payload: dict[str, Any]) -> str:
    return f"data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n"
