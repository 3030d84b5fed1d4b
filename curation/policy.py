"""Asking a policy many times: prompts of the RL pool, its answers, and how often it is right."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from curation.spread import Batch, Batches, Input, spread
from evaluation.answers import REASONING_SKILLS, boxed_contents, is_correct, parse_number
from model.chat import THINKING_SUFFIX, with_thinking
from model.checkpoint import load_model
from model.device import inference_dtype, own_device
from model.generation import Completion, Prompt, generate
from sailyard.media import decode_image
from sailyard.samples import Sample, SampleReader

if TYPE_CHECKING:
    from model.modeling import SailVLForConditionalGeneration
    from model.processor import SailVLProcessor
    from sailyard.recipe.data import Sampling

# "(A) 3", "B. 4", "C: red" on lines of their own.
_OPTION = re.compile(r"^\s*\(?([A-H])[).:]\s*(.+?)\s*$", re.MULTILINE)
# Free answers must be checkable: numbers and short formulas, not phrases (spec 3.9).
_SYMBOLIC = re.compile(r"^[-+*/^()=.\d\sa-zA-Zπ{}]{1,40}$")
_FUNCTION = re.compile(r"\\?(?:frac|sqrt|sin|cos|tan|log|ln|exp|pi)(?![a-z])")
_WORD = re.compile(r"[a-zA-Z]{2}")


class BadPrompt(ValueError):
    """A pool item cannot be asked; the message names it."""


@dataclass(slots=True)
class Asked:
    """One prompt with the policy's replies and which of them are right."""

    position: int  # in the pool
    sample: Sample  # as it was asked: the conversation ends in the user's turn
    replies: list[Completion]
    right: list[bool]

    @property
    def pass_rate(self) -> float:
        """Share of right replies: pass@n of the paper read as a success rate (spec A14)."""
        return mean(map(float, self.right))


def is_reasoning(sample: Sample) -> bool:
    """Whether the item's skill needs steps; the rest is perception."""
    return sample.meta.get("skill", sample.task) in REASONING_SKILLS


def as_prompt(sample: Sample, think: bool) -> Sample:
    """The item as a question: no answer in it, the thinking suffix when asked to think.

    Raises:
        BadPrompt: no question, or no answer to check against.
    """
    missing = [key for key in ("answer", "check") if key not in sample.meta]
    if missing:
        raise BadPrompt(f"pool item {sample.id!r} has no {missing[0]!r} in its meta")
    messages = [dict(message) for message in sample.messages]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] != "user":
        raise BadPrompt(f"pool item {sample.id!r} does not end in a question")
    question = messages[-1]["content"].removesuffix("\n" + THINKING_SUFFIX)
    messages[-1]["content"] = with_thinking(question) if think else question
    meta = {**sample.meta, "think": think}
    return Sample(
        sample.id, sample.source, sample.task, messages, sample.images, sample.is_video, meta
    )


def rewrite_options(sample: Sample) -> Sample | None:
    """A multiple-choice item as a free-response one; None where it is not one.

    Only numeric and symbolic options can be checked without their letters; others stay choices.
    """
    question = sample.messages[0]["content"]
    options = dict(_OPTION.findall(question))
    answer = str(sample.meta.get("answer", "")).strip("(). ")
    if len(options) < 2 or answer not in options:
        return None
    text = options[answer]
    plain = _FUNCTION.sub("", text)
    if _WORD.search(plain) or not _SYMBOLIC.match(plain):
        return None
    is_number = parse_number(text) is not None and not re.search(r"[a-zA-Z^*/(]", text)
    free = _OPTION.sub("", question).rstrip()
    messages = [{**sample.messages[0], "content": free}, *sample.messages[1:]]
    meta = {**sample.meta, "answer": text, "check": "number" if is_number else "math"}
    meta["rewritten_from"] = answer
    return Sample(
        sample.id, sample.source, sample.task, messages, sample.images, sample.is_video, meta
    )


def is_right(reply: Completion, sample: Sample) -> bool:
    """The rule check; where thinking was asked for, only a boxed answer counts."""
    if sample.meta.get("think") and not boxed_contents(reply.text):
        return False
    return is_correct(reply.text, str(sample.meta["answer"]), str(sample.meta["check"]))


def ask(
    model: SailVLForConditionalGeneration,
    processor: SailVLProcessor,
    prompts: Sequence[Sample],
    sampling: Sampling,
    seed: int,
) -> list[tuple[list[Completion], list[bool]]]:
    """`samples_per_prompt` replies to each prompt and whether they are right."""
    conversations = [
        Prompt(prompt.messages, [decode_image(data) for data in prompt.images], prompt.is_video)
        for prompt in prompts
    ]
    replies = generate(
        model,
        processor,
        conversations,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        seed=seed,
        batch_size=sampling.batch_size,
        num_samples=sampling.samples_per_prompt,
    )
    return [
        (group, [is_right(reply, prompt) for reply in group])
        for prompt, group in zip(prompts, replies, strict=True)
    ]


class Asking:
    """Asks batches of the pool's items with one copy of the policy.

    Reasoning items are asked to think, perception items to answer at once; multiple-choice items
    are rewritten first where that is possible.
    """

    def __init__(self, policy: Input, sampling: Sampling, seed: int) -> None:
        self.model, self.processor = load_model(policy.folder(), inference_dtype())
        self.model.to(own_device())
        self.sampling, self.seed = sampling, seed

    def __call__(self, batch: Batch) -> list[Asked]:
        """Each item of the batch as it was asked, with its replies."""
        prompts = [
            as_prompt(rewrite_options(item) or item, think=is_reasoning(item))
            for item in batch.samples
        ]
        seed = self.seed + batch.start
        asked = ask(self.model, self.processor, prompts, self.sampling, seed)
        return [
            Asked(position, prompt, replies, right)
            for position, prompt, (replies, right) in zip(
                batch.positions, prompts, asked, strict=True
            )
        ]


def ask_pool(
    policy: Input, pool: SampleReader, positions: Sequence[int], sampling: Sampling, seed: int
) -> Iterator[Asked]:
    """Ask the pool's items in the given order, a batch at a time, so a caller can stop early."""
    # A batch of the generator holds prompts times samples; asking one batch at a time means
    # that stopping early wastes at most that much, on each worker.
    step = max(sampling.batch_size // sampling.samples_per_prompt, 1)
    batches = Batches(pool, positions, step)
    for asked in spread(batches, partial(Asking, policy, sampling, seed)):
        yield from asked


def shuffled(length: int, seed: int, *salt: int) -> list[int]:
    """All positions in an order that the seed alone decides."""
    order: list[int] = np.random.default_rng([seed, *salt]).permutation(length).tolist()
    return order


def rate_histogram(rates: Sequence[float]) -> dict[str, int]:
    """How many prompts had each success rate, keyed "0.00" to "1.00"."""
    table: dict[str, Any] = {}
    for rate in sorted(rates):
        table[f"{rate:.2f}"] = table.get(f"{rate:.2f}", 0) + 1
    return table
