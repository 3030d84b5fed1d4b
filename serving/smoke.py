"""Stage deployment.smoke_test: start the server as users do and talk to it as users do.

What is asserted is the protocol: every reply arrives, is well formed, and is the same streamed
and whole; a request that must be refused is. How good the answers are is reported, not judged:
that was the gate's business.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from openai import BadRequestError, OpenAI

from sailyard.samples import Sample, read_samples
from sailyard.stage import StopRequested
from serving.probe import Answer, SmokeFailed, ask, quiet_client, server, wait_until_ready

if TYPE_CHECKING:
    from sailyard.stage import StageContext

QUESTIONS_PER_SKILL = 2
CONCURRENT = 8
THINKING_SKILLS = ("sum", "count", "chart")


def run(ctx: StageContext) -> None:
    """The stage: serve the run's version, ask held-out questions, stop the server."""
    promotion = json.loads((ctx.input("promotion") / "promotion.json").read_text(encoding="utf-8"))
    alias, checkpoint = promotion["alias"], promotion["checkpoint"]
    by_alias, target = target_of(ctx, alias, checkpoint)
    quiet_client()
    samples = pick(ctx.input("heldout"))
    started = time.monotonic()
    with server(target, ctx.scratch() / "server.log") as url:
        status = wait_until_ready(url)
        if by_alias and status["digest"] != checkpoint:
            raise SmokeFailed(
                f"the server loaded {status['digest'][:12]} though {alias!r} points at "
                f"{checkpoint[:12]}"
            )
        ready_seconds = time.monotonic() - started
        client = OpenAI(base_url=f"{url}/v1", api_key=_api_key(), max_retries=0, timeout=120)
        model = next(iter(client.models.list())).id
        answers = _ask_all(ctx, client, model, samples)
        check_refusals(client, model)
        together = ask_together(client, model, samples)
    _write(ctx.output("answers") / "answers.json", answers)
    ctx.summary(
        served=f"alias {alias}" if by_alias else "checkpoint",
        model=status["model"],
        checkpoint=checkpoint,
        ready_seconds=round(ready_seconds, 2),
        **figures(answers),
        concurrent=together,
        answers=[_shown(answer) for answer in answers],
    )


def target_of(ctx: StageContext, alias: str, checkpoint: str) -> tuple[bool, list[str]]:
    """Whether the alias points at the run's checkpoint, and the server's flags.

    With manual approval, or after somebody moved the alias on, the version is still tested:
    straight from its checkpoint.
    """
    current = ctx.registry.current(alias)
    if current is not None and current.checkpoint == checkpoint:
        return True, ["--alias", alias]
    return False, ["--checkpoint", str(ctx.artifacts.fetch(checkpoint))]


def pick(heldout: Path, per_skill: int = QUESTIONS_PER_SKILL) -> list[Sample]:
    """The first held-out questions of each skill, in stored order."""
    taken: dict[str, int] = defaultdict(int)
    chosen = []
    for sample in read_samples(heldout):
        skill = sample.meta.get("skill", sample.task)
        if taken[skill] < per_skill:
            taken[skill] += 1
            chosen.append(sample)
    if not chosen:
        raise SmokeFailed(f"{heldout} holds no question to ask")
    return chosen


def check_refusals(client: OpenAI, model: str) -> None:
    """An image behind an address must be refused, not fetched.

    Raises:
        SmokeFailed: it was not.
    """
    image = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}}
    request: Any = {"model": model, "messages": [{"role": "user", "content": [image]}]}
    try:
        client.chat.completions.create(**request)
    except BadRequestError:
        return
    raise SmokeFailed("the server took an http image URL; it must refuse to fetch")


def ask_together(client: OpenAI, model: str, samples: list[Sample]) -> dict[str, float]:
    """Several clients at once; latency and throughput under that load."""
    asked = (samples * CONCURRENT)[: 2 * CONCURRENT]
    started = time.perf_counter()
    with ThreadPoolExecutor(CONCURRENT) as pool:
        answers = list(pool.map(lambda sample: ask(client, model, sample, "whole"), asked))
    seconds = time.perf_counter() - started
    return {
        "clients": CONCURRENT,
        "requests": len(answers),
        "requests_per_second": round(len(answers) / seconds, 2),
        "tokens_per_second": round(sum(a.completion_tokens for a in answers) / seconds, 1),
        "latency_mean": round(mean(a.seconds for a in answers), 4),
        "latency_max": round(max(a.seconds for a in answers), 4),
    }


def figures(answers: list[Answer]) -> dict[str, Any]:
    """Latency in seconds and shares of right answers, by kind of request."""
    by_kind: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_kind[answer.kind].append(answer)
    latency = {
        kind: {
            "requests": len(group),
            "mean": round(mean(a.seconds for a in group), 4),
            "median": round(median(a.seconds for a in group), 4),
            "max": round(max(a.seconds for a in group), 4),
        }
        for kind, group in by_kind.items()
    }
    first = [a.first_token_seconds for a in answers if a.first_token_seconds is not None]
    marks = {
        kind: [a.correct for a in group if a.correct is not None] for kind, group in by_kind.items()
    }
    return {
        "latency_seconds": latency,
        "first_token_seconds": round(mean(first), 4) if first else None,
        "correct": {kind: mean(map(float, right)) for kind, right in marks.items() if right},
        "reasoned": mean(float(bool(a.reasoning)) for a in by_kind["thinking"])
        if by_kind["thinking"]
        else None,
    }


def _ask_all(ctx: StageContext, client: OpenAI, model: str, samples: list[Sample]) -> list[Answer]:
    # The first request pays for lazy initialisation and would blur the latencies.
    ask(client, model, samples[0], "whole")
    answers: list[Answer] = []
    for done, sample in enumerate(samples):
        if ctx.stop_requested:
            raise StopRequested("the smoke test keeps nothing; it starts over")
        whole = ask(client, model, sample, "whole")
        streamed = ask(client, model, sample, "streamed")
        if (whole.content, whole.reasoning) != (streamed.content, streamed.reasoning):
            raise SmokeFailed(
                f"{sample.id} streamed gives {streamed.content!r}, whole {whole.content!r}"
            )
        answers += [whole, streamed]
        if whole.skill in THINKING_SKILLS:
            answers.append(ask(client, model, sample, "thinking"))
        ctx.progress(done + 1, len(samples), f"{whole.skill}: {whole.content[:40]}")
    return answers


def _shown(answer: Answer) -> dict[str, Any]:
    return {
        **asdict(answer),
        "seconds": round(answer.seconds, 4),
        "first_token_seconds": answer.first_token_seconds and round(answer.first_token_seconds, 4),
    }


def _write(path: Path, answers: list[Answer]) -> None:
    # Without the times, so that the same version gives the same artifact.
    kept = [
        {
            name: value
            for name, value in asdict(answer).items()
            if name not in ("seconds", "first_token_seconds")
        }
        for answer in answers
    ]
    path.write_text(json.dumps(kept, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _api_key() -> str:
    return os.environ.get("SAILYARD_SERVE_API_KEY") or "none"
