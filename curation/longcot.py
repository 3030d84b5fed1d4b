"""Stage curation.longcot: chains of thought in one format, filtered and balanced (paper 4.1.3).

Questions with a known answer are cleaned of hints that contradict a chain, asked once each, and
answered by a guided chain: the writer is given the question and its truth. Writers make mistakes,
and this one makes some on purpose, so that every filter after it has something to catch: format,
distillation of wordy answers, correctness, redundancy, and a balanced length histogram.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from curation.ngrams import words
from curation.world.scene import pick_weighted
from model.chat import LONG_ANSWER_SUFFIX, SHORT_ANSWER_SUFFIX, THINKING_SUFFIX, with_thinking
from sailyard.samples import Sample, SampleReader, write_samples

if TYPE_CHECKING:
    from sailyard.recipe.data import LongCoTData
    from sailyard.stage import StageContext

# How often the writer goes wrong, and how; our choice.
WRITER_FAULTS = {
    "none": 0.84,
    "unclosed": 0.03,
    "unboxed": 0.03,
    "wordy": 0.05,
    "redundant": 0.03,
    "slip": 0.02,
}
_FORMAT = re.compile(
    r"<think>(?P<chain>(?:(?!</?think>).)+)</think>\s*\\boxed\{(?P<answer>[^{}]+)\}", re.DOTALL
)
_HINTS = (
    THINKING_SUFFIX,
    SHORT_ANSWER_SUFFIX.strip(),
    LONG_ANSWER_SUFFIX.strip(),
    "Please answer yes or no.",
    "Answer briefly, without explanation.",
)
_IMAGES = re.compile(r"(?:(?:Frame-\d+: )?<image>\n)+")


@dataclass(frozen=True, slots=True)
class Task:
    """One question with its truth, ready for the writer. `sample` lends images and meta."""

    sample: Sample
    question: str  # with image placeholders, without hints
    answer: str
    chain: str
    skill: str
    check: str


@dataclass(frozen=True, slots=True)
class Written:
    """A task and what the writer made of it."""

    task: Task
    chain: str
    answer: str

    @property
    def num_words(self) -> int:
        return len(words(self.chain))


def clean_question(text: str) -> str:
    """The question without hints about the form of its answer."""
    for hint in _HINTS:
        text = text.replace(hint, "")
    return "\n".join(line.rstrip() for line in text.split("\n") if line.strip())


def tasks_of(sample: Sample) -> Iterator[Task]:
    """Every question of a sample whose answer and reasons are known; system turns are dropped."""
    turns = [m["content"] for m in sample.messages if m["role"] == "user"]
    truths = sample.meta.get("questions") or [sample.meta]
    if not turns or len(turns) != len(truths):
        return
    match = _IMAGES.match(turns[0])
    images = match[0] if match else ""
    for turn, truth in zip(turns, truths, strict=True):
        if not truth.get("chain") or "answer" not in truth:
            continue
        question = images + clean_question(_IMAGES.sub("", turn))
        yield Task(
            sample, question, truth["answer"], truth["chain"], truth["skill"], truth["check"]
        )


def task_key(task: Task) -> bytes:
    """What makes two tasks the same: the pictures and the question."""
    digest = hashlib.sha256(task.question.encode())
    for image in task.sample.images:
        digest.update(hashlib.sha256(image).digest())
    return digest.digest()


def write_chain(task: Task, rng: np.random.Generator) -> str:
    """The guided reply, with the writer's occasional fault."""
    fault = pick_weighted(rng, WRITER_FAULTS)
    if fault == "unclosed":
        return f"<think>{task.chain}\n\\boxed{{{task.answer}}}"
    if fault == "unboxed":
        return f"<think>{task.chain}</think>\n{task.answer}"
    if fault == "wordy":
        return f"<think>{task.chain}</think>\n\\boxed{{The answer is {task.answer}.}}"
    if fault == "redundant":
        return f"<think>{task.answer} {task.answer}.</think>\n\\boxed{{{task.answer}}}"
    if fault == "slip":
        return f"<think>{task.chain}</think>\n\\boxed{{unknown}}"
    return f"<think>{task.chain}</think>\n\\boxed{{{task.answer}}}"


def parse_reply(reply: str) -> tuple[str, str] | None:
    """(chain, answer) of a reply in the one allowed format, else None."""
    match = _FORMAT.fullmatch(reply.strip())
    return (match["chain"].strip(), match["answer"].strip()) if match else None


def distil(answer: str, truth: str) -> str:
    """A wordy answer shortened to the truth when it holds exactly that, else as it is."""
    if answer == truth:
        return answer
    held, wanted = words(answer), words(truth)
    places = range(len(held) - len(wanted) + 1)
    return truth if any(held[i : i + len(wanted)] == wanted for i in places) else answer


def overlap(chain: str, answer: str) -> float:
    """Share of the chain's words that the answer has too: 1 only repeats it."""
    said, allowed = [w for w in words(chain) if w.isalnum()], set(words(answer))
    return sum(word in allowed for word in said) / len(said) if said else 1.0


def balance_lengths(
    written: Sequence[Written], num: int, num_bins: int, rng: np.random.Generator
) -> tuple[list[Written], list[dict[str, int]]]:
    """At most `num` items, drawn as evenly as they allow over bins of equal chain length.

    Returns the items in their first order, and per bin its limits and counts before and after.
    """
    if not written:
        return [], []
    lengths = np.array([w.num_words for w in written])
    edges = np.linspace(lengths.min(), lengths.max() + 1, num_bins + 1)
    member = np.clip(np.digitize(lengths, edges) - 1, 0, num_bins - 1)
    bins = [np.flatnonzero(member == b) for b in range(num_bins)]
    takes = _fill_evenly([len(b) for b in bins], num)
    chosen: list[int] = []
    report = []
    for b, (inside, take) in enumerate(zip(bins, takes, strict=True)):
        chosen += [int(i) for i in rng.permutation(inside)[:take]]
        limits = {"from": int(np.ceil(edges[b])), "to": int(np.ceil(edges[b + 1])) - 1}
        report.append(limits | {"before": len(inside), "after": take})
    return [written[i] for i in sorted(chosen)], report


def _fill_evenly(sizes: list[int], num: int) -> list[int]:
    """Raise a common level until `num` items are taken; small bins give all they have."""
    takes = [0] * len(sizes)
    left = min(num, sum(sizes))
    while left:
        open_bins = [b for b, size in enumerate(sizes) if takes[b] < size]
        step = max(1, left // len(open_bins))
        for b in open_bins:
            more = min(step, sizes[b] - takes[b], left)
            takes[b] += more
            left -= more
    return takes


def as_sample(item: Written, name: str) -> Sample:
    """The training sample: question with the thinking suffix, chain, boxed answer."""
    task = item.task
    origin = task.sample
    messages = [
        {"role": "user", "content": with_thinking(task.question)},
        {"role": "assistant", "content": f"<think>{item.chain}</think>\n\\boxed{{{item.answer}}}"},
    ]
    meta = {"answer": task.answer, "check": task.check, "skill": task.skill, "think": True}
    if "scene" in origin.meta:
        meta["scene"] = origin.meta["scene"]
    return Sample(name, origin.source, task.skill, messages, origin.images, origin.is_video, meta)


def filtered(
    samples: Iterator[Sample],
    rng: np.random.Generator,
    recipe: LongCoTData,
    funnel: Counter[str],
    counts: Counter[str],
) -> Iterator[Written]:
    """Everything up to the length balance.

    `funnel` counts questions and what each filter takes of them, `counts` the rest: answers that
    were shortened, samples that held no question with known reasons.
    """
    seen: set[bytes] = set()
    for sample in samples:
        tasks = list(tasks_of(sample))
        counts["without_chain"] += not tasks
        for task in tasks:
            funnel["questions"] += 1
            if recipe.skills and task.skill not in recipe.skills:
                funnel["one look"] += 1
                continue
            key = task_key(task)
            if key in seen:
                funnel["duplicate"] += 1
                continue
            seen.add(key)
            parsed = parse_reply(write_chain(task, rng))
            if parsed is None:
                funnel["malformed"] += 1
                continue
            chain, raw = parsed
            answer = distil(raw, task.answer)
            counts["distilled"] += answer != raw
            if answer != task.answer:
                funnel["wrong"] += 1
            elif overlap(chain, answer) > recipe.max_overlap:
                funnel["redundant"] += 1
            else:
                yield Written(replace(task, answer=answer), chain, answer)


def run(ctx: StageContext) -> None:
    """The stage: the prompt pool and curated instructions in, chains of thought out."""
    recipe = ctx.section("curation.longcot")
    rng = np.random.default_rng(ctx.seed)
    readers = [SampleReader(ctx.input(name)) for name in ctx.input_names]
    total = sum(len(reader) for reader in readers)
    funnel: Counter[str] = Counter()
    counts: Counter[str] = Counter()

    def raw() -> Iterator[Sample]:
        done = 0
        for reader in readers:
            for index in range(len(reader)):
                done += 1
                ctx.progress(done, total, f"{funnel['questions']} questions")
                yield reader[index]

    written = list(filtered(raw(), rng, recipe, funnel, counts))
    kept, histogram = balance_lengths(written, recipe.num_samples, recipe.length_bins, rng)
    skills = Counter(item.task.skill for item in kept)
    samples = (as_sample(item, f"cot-{i:06d}") for i, item in enumerate(kept))
    count = write_samples(ctx.output("longcot"), samples)
    funnel["unbalanced"] = len(written) - count
    ctx.summary(
        num_samples=count,
        funnel=dict(funnel),
        distilled=counts["distilled"],
        without_chain=counts["without_chain"],
        lengths=histogram,
        skills=dict(skills),
    )
