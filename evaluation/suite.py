"""Stage evaluation.suite: every checkpoint answers the same held-out questions.

Two modes. *Direct* asks the bare question of every skill. *Thinking* adds the released thinking
suffix to the reasoning skills, for checkpoints from the soup on (earlier ones never met it).
Decoding is greedy. A score is worth nothing without the conditions it was measured under, so the
report keeps the harness version, the hash of every rendered prompt, the token budget and the
digest of the questions beside it.
"""

from __future__ import annotations

import gc
import hashlib
import json
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from evaluation.answers import REASONING_SKILLS, format_reward, is_correct
from evaluation.baselines import majority_per_skill
from evaluation.paper_tables import for_report
from evaluation.routing import router_health
from model.chat import render, with_thinking
from model.checkpoint import load_model
from model.device import inference_dtype, own_device
from model.generation import Completion, Prompt, generate
from sailyard.media import decode_image, encode_png
from sailyard.samples import SKILLS, Sample, read_samples

if TYPE_CHECKING:
    from model.modeling import SailVLForConditionalGeneration
    from model.processor import SailVLProcessor
    from sailyard.stage import StageContext

HARNESS = "sailyard.evaluation.suite"
VERSION = 1
# Checkpoints that are also asked to think; the soup is their common starting point.
THINKERS = ("soup", "longcot_sft", "verifiable_rl", "think_fusion_sft", "mixed_rl")
# A short answer is at most a box of about 30 tokens; a runaway reply is wrong anyway.
DIRECT_TOKENS = 48
EXAMPLES_PER_SKILL = 2
ROUTED_PROMPTS = 96  # of an expert model, spread over all skills
PLACEHOLDER = re.compile(r"(Frame-\d+: )?<image>\n")
DIRECT, THINKING = "direct", "thinking"


class HeldoutError(ValueError):
    """The held-out set cannot be scored; the message names the item."""


@dataclass(frozen=True, slots=True)
class Question:
    """One held-out question: the turns before the reply and the rule its answer is held to."""

    id: str
    skill: str
    messages: list[dict[str, str]]
    images: list[Image.Image]
    is_video: bool
    answer: str
    check: str

    @property
    def text(self) -> str:
        """The user's words without image placeholders."""
        return PLACEHOLDER.sub("", self.messages[-1]["content"])

    def asked(self, mode: str) -> list[dict[str, str]]:
        """The turns as the mode words them."""
        if mode == DIRECT:
            return self.messages
        *before, last = self.messages
        return [*before, {**last, "content": with_thinking(last["content"])}]


@dataclass(slots=True)
class ModeResult:
    """What one checkpoint did in one mode."""

    accuracy: dict[str, float]  # per skill, 0-1
    replies: dict[str, tuple[str, bool]]  # question id -> (reply, right)
    mean_tokens: float
    unfinished: float  # share of replies cut off by the budget
    format_rate: float | None = None  # thinking only: share that is well formed

    @property
    def overall(self) -> float:
        """Plain mean over skills, as the paper's Overall rows are."""
        return mean(self.accuracy.values())

    def summary(self) -> dict[str, Any]:
        """The figures without the replies."""
        figures = {
            "overall": self.overall,
            "skills": self.accuracy,
            "mean_tokens": self.mean_tokens,
            "unfinished": self.unfinished,
        }
        if self.format_rate is not None:
            figures["format_rate"] = self.format_rate
        return figures


@dataclass(slots=True)
class CheckpointResult:
    """All modes of one checkpoint."""

    modes: dict[str, ModeResult]
    seconds: float
    router: dict[str, float] = field(default_factory=dict)  # expert models only

    def with_thinking(self) -> dict[str, float]:
        """Accuracy per skill when reasoning skills are asked to think and the rest are not."""
        thinking = self.modes.get(THINKING)
        return {**self.modes[DIRECT].accuracy, **(thinking.accuracy if thinking else {})}

    def summary(self, baseline: Mapping[str, float]) -> dict[str, Any]:
        """One checkpoint's part of the report.

        ``accuracy`` is the direct mode over all skills; ``accuracy_thinking`` lets the reasoning
        skills think first; ``least_margin`` is the worst skill's lead over its baseline.
        """
        direct = self.modes[DIRECT]
        return {
            "accuracy": direct.overall,
            "accuracy_thinking": mean(self.with_thinking().values()),
            "least_margin": min(direct.accuracy[skill] - baseline[skill] for skill in baseline),
            "modes": {mode: result.summary() for mode, result in self.modes.items()},
            "seconds": self.seconds,
            **({"router": self.router} if self.router else {}),
        }


def load_questions(directory: Path, per_skill: int) -> list[Question]:
    """The first `per_skill` questions of each skill, in stored order.

    Raises:
        HeldoutError: an item lacks its answer or rule, or the set is empty.
    """
    taken: dict[str, int] = defaultdict(int)
    questions = []
    for sample in read_samples(directory):
        skill = sample.meta.get("skill", sample.task)
        if taken[skill] >= per_skill:
            continue
        taken[skill] += 1
        questions.append(_question(sample, skill))
    if not questions:
        raise HeldoutError(f"{directory} holds no question")
    order = {skill: i for i, skill in enumerate(SKILLS)}
    return sorted(questions, key=lambda question: order.get(question.skill, len(order)))


def _question(sample: Sample, skill: str) -> Question:
    missing = [key for key in ("answer", "check") if key not in sample.meta]
    if missing:
        raise HeldoutError(f"held-out item {sample.id!r} has no {missing[0]!r} in its meta")
    messages = [m for m in sample.messages if m["role"] != "assistant"]
    if not messages or messages[-1]["role"] != "user":
        raise HeldoutError(f"held-out item {sample.id!r} does not end in a question")
    images = [decode_image(data) for data in sample.images]
    answer, check = str(sample.meta["answer"]), str(sample.meta["check"])
    return Question(sample.id, skill, messages, images, sample.is_video, answer, check)


def ask(
    model: SailVLForConditionalGeneration,
    processor: SailVLProcessor,
    questions: Sequence[Question],
    mode: str,
    *,
    max_new_tokens: int,
    batch_size: int,
) -> ModeResult:
    """Greedy answers to all questions in one mode, scored by each question's rule."""
    # Sorted by skill, prompts of a batch are of similar length and so are their replies.
    conversations = [Prompt(q.asked(mode), q.images, q.is_video) for q in questions]
    completions = generate(
        model,
        processor,
        conversations,
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        batch_size=batch_size,
    )
    return score(questions, [completion for (completion,) in completions], mode)


def score(
    questions: Sequence[Question], completions: Sequence[Completion], mode: str
) -> ModeResult:
    """Hold replies against the questions' rules."""
    right: dict[str, list[bool]] = defaultdict(list)
    replies: dict[str, tuple[str, bool]] = {}
    for question, completion in zip(questions, completions, strict=True):
        good = is_correct(completion.text, question.answer, question.check)
        right[question.skill].append(good)
        replies[question.id] = (completion.text, good)
    return ModeResult(
        accuracy={skill: mean(map(float, marks)) for skill, marks in right.items()},
        replies=replies,
        mean_tokens=mean(len(c.token_ids) for c in completions),
        unfinished=mean(float(not c.finished) for c in completions),
        format_rate=(
            mean(float(format_reward(c.text)) for c in completions) if mode == THINKING else None
        ),
    )


def evaluate(
    directory: Path,
    questions: Sequence[Question],
    *,
    thinking: bool,
    max_new_tokens: int,
    batch_size: int,
) -> CheckpointResult:
    """Load one checkpoint, ask every question, let the checkpoint go again."""
    started = time.monotonic()
    model, processor = load_model(directory, inference_dtype())
    model.to(own_device())
    modes = {
        DIRECT: ask(
            model,
            processor,
            questions,
            DIRECT,
            max_new_tokens=min(DIRECT_TOKENS, max_new_tokens),
            batch_size=batch_size,
        )
    }
    reasoning = [question for question in questions if question.skill in REASONING_SKILLS]
    if thinking and reasoning:
        modes[THINKING] = ask(
            model,
            processor,
            reasoning,
            THINKING,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
    sampled = questions[:: max(len(questions) // ROUTED_PROMPTS, 1)]
    prompts = [Prompt(q.messages, q.images, q.is_video) for q in sampled]
    router = router_health(model, processor, prompts)
    del model
    gc.collect()  # checkpoints are held one at a time, however many there are
    return CheckpointResult(modes, time.monotonic() - started, router)


def prompt_hash(questions: Sequence[Question], system_message: str) -> str:
    """sha256 over every rendered prompt of both modes."""
    digest = hashlib.sha256()
    for question in questions:
        for mode in (DIRECT, THINKING) if question.skill in REASONING_SKILLS else (DIRECT,):
            digest.update(render(question.asked(mode), True, system_message).encode() + b"\0")
    return digest.hexdigest()


def examples(
    questions: Sequence[Question], results: Mapping[str, CheckpointResult]
) -> list[tuple[Question, dict[str, Any]]]:
    """A few questions per skill with every checkpoint's replies, for the board."""
    shown: dict[str, int] = defaultdict(int)
    chosen: list[tuple[Question, dict[str, Any]]] = []
    for question in questions:
        shown[question.skill] += 1
        if shown[question.skill] > EXAMPLES_PER_SKILL:
            continue
        replies = {
            name: {
                mode: {
                    "reply": outcome.replies[question.id][0],
                    "right": outcome.replies[question.id][1],
                }
                for mode, outcome in result.modes.items()
                if question.id in outcome.replies
            }
            for name, result in results.items()
        }
        entry = {
            "id": question.id,
            "skill": question.skill,
            "question": question.text,
            "answer": question.answer,
            "image": f"images/{len(chosen):03d}.png",
            "replies": replies,
        }
        chosen.append((question, entry))
    return chosen


def strip(images: Sequence[Image.Image]) -> Image.Image:
    """Images side by side: a clip as one picture."""
    sheet = Image.new("RGB", (sum(i.width for i in images), max(i.height for i in images)))
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width
    return sheet


def run(ctx: StageContext) -> None:
    """The stage: inputs are the held-out set and one directory per checkpoint."""
    suite = ctx.section("evaluation.suite")
    torch.set_num_threads(suite.threads)
    questions = load_questions(ctx.input("heldout"), suite.per_skill)
    per_skill: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for question in questions:
        per_skill[question.skill].append((question.answer, question.check))
    baselines = majority_per_skill(per_skill)
    floor = {skill: baseline.accuracy for skill, baseline in baselines.items()}
    names = [name for name in ctx.input_names if name != "heldout"]
    results: dict[str, CheckpointResult] = {}
    for index, name in enumerate(names):
        results[name] = evaluate(
            ctx.input(name),
            questions,
            thinking=name in THINKERS,
            max_new_tokens=suite.max_new_tokens,
            batch_size=suite.batch_size,
        )
        figures = results[name].summary(floor)
        ctx.metric(index, accuracy=figures["accuracy"], **results[name].modes[DIRECT].accuracy)
        ctx.progress(index + 1, len(names), f"{name} {figures['accuracy']:.3f}")
    budget = {DIRECT: min(DIRECT_TOKENS, suite.max_new_tokens), THINKING: suite.max_new_tokens}
    report = {
        "harness": {"name": HARNESS, "version": VERSION},
        "prompt_hash": prompt_hash(questions, ctx.section("model.system_message")),
        "token_budget": budget,
        "heldout": {
            "digest": ctx.input_digest("heldout"),
            "questions": len(questions),
            "per_skill": {skill: len(pairs) for skill, pairs in per_skill.items()},
        },
        "baseline": {
            "overall": mean(floor.values()),
            "skills": floor,
            "answers": {skill: baseline.answer for skill, baseline in baselines.items()},
        },
        "checkpoints": {name: result.summary(floor) for name, result in results.items()},
        "digests": {name: ctx.input_digest(name) for name in names},
        "paper": for_report(),
    }
    _write(ctx.output("report"), report, examples(questions, results))
    ctx.summary(
        **{key: report[key] for key in ("harness", "prompt_hash", "token_budget", "heldout")},
        baseline=report["baseline"],
        checkpoints=report["checkpoints"],
    )


def _write(
    directory: Path, report: dict[str, Any], chosen: Sequence[tuple[Question, dict[str, Any]]]
) -> None:
    (directory / "images").mkdir(exist_ok=True)
    for question, entry in chosen:
        (directory / entry["image"]).write_bytes(encode_png(strip(question.images)))
    report["examples"] = [entry for _, entry in chosen]
    text = json.dumps(report, ensure_ascii=False, indent=2, sort_keys=True)
    (directory / "report.json").write_text(text + "\n", encoding="utf-8")
