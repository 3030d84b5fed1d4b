"""A strong model behind an OpenAI-compatible API, asked about many samples at once.

The paper's teachers (caption scores, re-annotation) are unnamed closed models; any server that
speaks chat completions will do. Calls run concurrently up to a bound, transient failures are
retried by the client with back-off, and whatever the teacher will not answer in the asked form
is counted as a refusal with a reason, never guessed.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from openai import APIStatusError, AsyncOpenAI, BadRequestError

T = TypeVar("T")

ASKS = 2  # a reply that does not parse is asked for once more before it counts as a refusal
RETRIES = 4  # of one call, on 408, 409, 429, 5xx and connection errors
TIMEOUT_SECONDS = 120.0


class TeacherError(ValueError):
    """The teacher cannot be used at all (bad address, key or model name)."""


class Declined(Exception):
    """Raised by a parser: the reply is in the asked form and says that there is no answer."""


@dataclass(frozen=True, slots=True)
class Question:
    """What to ask about one sample: a prompt and its encoded images."""

    prompt: str
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Reply(Generic[T]):
    """A parsed answer, or None with the reason: "refused", "filtered" or "unparsable"."""

    value: T | None
    reason: str = ""


class ApiTeacher:
    """Asks one model of one server.

    Args:
        api_base: the server's base address, such as ``http://host:8000/v1``.
        api_model: model name as the server knows it.
        concurrency: most calls in flight.
        api_key: default: the environment variable OPENAI_API_KEY; servers without keys take any.
    """

    def __init__(
        self,
        api_base: str,
        api_model: str,
        concurrency: int,
        *,
        api_key: str | None = None,
        retries: int = RETRIES,
    ) -> None:
        if not api_base or not api_model:
            raise TeacherError(
                "an api teacher needs an address and a model: set api_base and api_model beside "
                'teacher, or teacher to "oracle"'
            )
        self.api_base, self.api_model, self.concurrency = api_base, api_model, concurrency
        self.retries = retries
        self._key = api_key or os.environ.get("OPENAI_API_KEY") or "none"

    def ask_many(
        self,
        questions: Sequence[Question],
        parse: Callable[[str], T],
        on_reply: Callable[[int], None] = lambda done: None,
    ) -> list[Reply[T]]:
        """Ask every question; replies come in the order of the questions.

        `parse` turns a reply's text into a value; it raises ValueError when it cannot (the
        question is asked once more) and Declined when the reply says that there is no answer.
        `on_reply` is called with the number of questions settled so far.

        Raises:
            TeacherError: the server refuses the key, the path or the model.
        """
        return asyncio.run(self._ask_many(questions, parse, on_reply))

    async def _ask_many(
        self,
        questions: Sequence[Question],
        parse: Callable[[str], T],
        on_reply: Callable[[int], None],
    ) -> list[Reply[T]]:
        gate = asyncio.Semaphore(self.concurrency)
        settled = 0
        client = AsyncOpenAI(
            base_url=self.api_base,
            api_key=self._key,
            max_retries=self.retries,
            timeout=TIMEOUT_SECONDS,
        )

        async def one(question: Question) -> Reply[T]:
            nonlocal settled
            async with gate:
                reply = await self._ask(client, question, parse)
            settled += 1
            on_reply(settled)
            return reply

        async with client:
            return list(await asyncio.gather(*map(one, questions)))

    async def _ask(
        self, client: AsyncOpenAI, question: Question, parse: Callable[[str], T]
    ) -> Reply[T]:
        for _ in range(ASKS):
            try:
                completion = await client.chat.completions.create(
                    model=self.api_model,
                    messages=[{"role": "user", "content": _content(question)}],  # type: ignore[list-item,misc]
                    temperature=0.0,
                )
            except BadRequestError:
                return Reply(None, "refused")  # the server will not take this item
            except APIStatusError as error:
                if error.status_code in (401, 403, 404):
                    raise TeacherError(
                        f"{self.api_base} answered {error.status_code} for model "
                        f"{self.api_model!r}: check api_base, api_model and OPENAI_API_KEY"
                    ) from error
                raise
            choice = completion.choices[0]
            if choice.finish_reason == "content_filter":
                return Reply(None, "filtered")
            if choice.message.refusal:
                return Reply(None, "refused")
            try:
                return Reply(parse(choice.message.content or ""))
            except Declined:
                return Reply(None, "refused")
            except ValueError:
                continue
        return Reply(None, "unparsable")


def parse_object(text: str) -> dict[str, Any]:
    """The one JSON object a reply consists of (a Markdown fence around it is allowed).

    Raises:
        ValueError: anything else, including text before or after the object.
    """
    body = text.strip()
    if body.startswith("```"):
        body = body.removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    value = json.loads(body)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def _content(question: Question) -> list[dict[str, Any]]:
    images = [
        {"type": "image_url", "image_url": {"url": f"data:{_mime(data)};base64,{_base64(data)}"}}
        for data in question.images
    ]
    return [*images, {"type": "text", "text": question.prompt}]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _mime(data: bytes) -> str:
    return "image/jpeg" if data.startswith(b"\xff\xd8") else "image/png"
