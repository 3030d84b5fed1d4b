"""A client for the smoke test: a server in a process of its own, and questions to it."""

from __future__ import annotations

import base64
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from openai import OpenAI

from sailyard.samples import IMAGE_PLACEHOLDER, Sample

MAX_TOKENS = 64
THINKING_TOKENS = 256
START_SECONDS = 300.0  # an 8B checkpoint takes minutes to load
STOP_SECONDS = 60.0
THINKING = {"chat_template_kwargs": {"enable_thinking": True}}
# Answers of these rules are right when they are equal; a box needs the evaluation's rule.
EXACT_CHECKS = ("exact", "number")


class SmokeFailed(RuntimeError):
    """The endpoint did not do what it promises; the message says which promise."""


@dataclass(slots=True)
class Answer:
    """One exchange."""

    skill: str
    kind: str
    """whole | streamed | thinking"""
    question: str
    expected: str
    content: str
    reasoning: str
    correct: bool | None
    """None: the skill's rule is not a plain comparison"""
    seconds: float
    first_token_seconds: float | None
    completion_tokens: int
    finish_reason: str


@contextmanager
def server(target: list[str], log: Path) -> Iterator[str]:
    """``python -m serving`` on a free loopback port; yields its address, then stops it.

    Raises:
        SmokeFailed: the process ended, or said no address; with the end of its log.
    """
    command = [sys.executable, "-m", "serving", "--port", "0", "--parent", str(os.getpid())]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*command, *target], stdout=subprocess.PIPE, stderr=sink, stdin=subprocess.DEVNULL
        )
    try:
        yield _address(process, log)
    except BaseException:
        print(_tail(log), file=sys.stderr)
        raise
    finally:
        process.terminate()
        try:
            process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    lines: queue.Queue[bytes] = queue.Queue()
    assert process.stdout is not None
    stdout = process.stdout
    threading.Thread(target=lambda: lines.put(stdout.readline()), daemon=True).start()
    try:
        line = lines.get(timeout=START_SECONDS).decode().strip()
    except queue.Empty:
        line = ""
    said, _, url = line.partition("serving on ")
    if said or not url:
        raise SmokeFailed(f"the server did not start: {_tail(log)}")
    return url


def wait_until_ready(url: str) -> dict[str, Any]:
    """What /ready says once it is.

    Raises:
        SmokeFailed: it never was; with the reason the server gives.
    """
    until, last = time.monotonic() + START_SECONDS, "no answer"
    while time.monotonic() < until:
        try:
            with urlopen(f"{url}/ready", timeout=10) as response:
                status: dict[str, Any] = json.load(response)
                return status
        except OSError as error:  # a server that stalls is no URLError
            read = getattr(error, "read", None)
            last = read().decode(errors="replace") if read else str(error)
        time.sleep(0.1)
    raise SmokeFailed(f"the server was not ready after {START_SECONDS:.0f} s: {last}")


def quiet_client() -> None:
    """One log line per request would bury the rest of a stage's log."""
    for name in ("httpx", "httpx2", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)


def parts_of(sample: Sample) -> list[dict[str, Any]]:
    """A sample's question as content parts: texts and inline images in their order."""
    turn = [m for m in sample.messages if m["role"] == "user"][-1]["content"]
    first, *rest = turn.split(IMAGE_PLACEHOLDER)
    parts: list[dict[str, Any]] = [{"type": "text", "text": first}] if first else []
    for image, text in zip(sample.images, rest, strict=True):
        data = base64.b64encode(image).decode()
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
        if text := text.removeprefix("\n"):
            parts.append({"type": "text", "text": text})
    return parts


def ask(client: OpenAI, model: str, sample: Sample, kind: str) -> Answer:
    """One question: "whole", "streamed" or "thinking".

    Raises:
        SmokeFailed: the reply is not well formed.
    """
    request: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": parts_of(sample)}],
        "temperature": 0,
        "max_tokens": THINKING_TOKENS if kind == "thinking" else MAX_TOKENS,
        "extra_body": THINKING if kind == "thinking" else {},
    }
    started = time.perf_counter()
    reply = _streamed(client, request) if kind == "streamed" else _whole(client, request)
    if reply.finish not in ("stop", "length") or reply.tokens < 1:
        raise SmokeFailed(
            f"{kind} reply to {sample.id}: finish {reply.finish!r}, {reply.tokens} tokens"
        )
    if "<think>" in reply.content:
        raise SmokeFailed(f"{kind} reply to {sample.id} shows its reasoning in the answer")
    return Answer(
        skill=str(sample.meta.get("skill", sample.task)),
        kind=kind,
        question="".join(part.get("text", "") for part in parts_of(sample)),
        expected=str(sample.meta.get("answer", "")),
        content=reply.content,
        reasoning=reply.reasoning,
        correct=is_right(reply.content, sample),
        seconds=time.perf_counter() - started,
        first_token_seconds=reply.first_token_at and reply.first_token_at - started,
        completion_tokens=reply.tokens,
        finish_reason=str(reply.finish),
    )


@dataclass(slots=True)
class _Reply:
    content: str = ""
    reasoning: str = ""
    finish: str | None = None
    tokens: int = 0
    first_token_at: float | None = None


def _whole(client: OpenAI, request: dict[str, Any]) -> _Reply:
    answer = client.chat.completions.create(**request)
    choice = answer.choices[0]
    return _Reply(
        content=choice.message.content or "",
        reasoning=(choice.message.model_extra or {}).get("reasoning") or "",
        finish=choice.finish_reason,
        tokens=answer.usage.completion_tokens,
    )


def _streamed(client: OpenAI, request: dict[str, Any]) -> _Reply:
    reply = _Reply()
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in client.chat.completions.create(**request, **options):
        reply.tokens = chunk.usage.completion_tokens if chunk.usage else reply.tokens
        for choice in chunk.choices:
            reply.content += choice.delta.content or ""
            reply.reasoning += (choice.delta.model_extra or {}).get("reasoning") or ""
            reply.finish = choice.finish_reason or reply.finish
            if reply.first_token_at is None and (reply.content or reply.reasoning):
                reply.first_token_at = time.perf_counter()
    return reply


def is_right(content: str, sample: Sample) -> bool | None:
    """Whether the answer equals the expected one; None where equality is not the rule."""
    if sample.meta.get("check") not in EXACT_CHECKS:
        return None
    _, boxed, rest = content.rpartition("\\boxed{")
    answer = rest.partition("}")[0] if boxed else content
    return _plain(answer) == _plain(str(sample.meta["answer"]))


def _plain(text: str) -> str:
    return text.strip().strip(".").strip().lower()


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-4000:]
