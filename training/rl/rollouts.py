"""Prompts in a fixed order, and groups of replies sampled from the current policy.

Everything here is a function of (seed, step, prompt): no random state is carried from one step
to the next, so a run that was killed and resumed samples what it would have sampled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.chat import THINKING_SUFFIX
from model.generation import Completion, generate
from model.generation import Prompt as Conversation
from model.modeling import SailVLForConditionalGeneration
from model.processor import SailVLProcessor
from sailyard.media import decode_image
from sailyard.samples import Sample, SampleReader, read_table
from training.rl.judges import RoutingJudge
from training.rl.losses import overlong_penalty
from training.rl.rewards import Judge, Prompt, RewardError, RewardScheme, RewardTerms, score

HELDOUT_SHARE = 0.2
MAX_HELDOUT = 128
"""Prompts kept away from training, to measure the reward before and after on equal terms (our
choice). More would only steady the figure: at five replies each, 128 prompts put the standard
error of a paired difference near 0.02."""


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How replies are drawn; the same in training and on the held-out prompts.

    overlong_buffer: last tokens of the budget over which the soft penalty on length grows; 0
    for none.
    """

    rollouts_per_prompt: int
    max_new_tokens: int
    temperature: float
    overlong_buffer: int = 0


@dataclass(frozen=True, slots=True)
class Rollout:
    """One reply with its score. `group` numbers the prompt inside its step."""

    prompt: Prompt
    group: int
    completion: Completion
    terms: RewardTerms
    reward: float


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from the parts, stable across processes and Python versions."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class PromptSet:
    """The prompts of an RL stage, split once into training and held-out ones."""

    def __init__(self, directory: Path, seed: int) -> None:
        self._reader = SampleReader(directory)
        self._directory = directory
        self._seed = seed
        order = _permutation(len(self._reader), derive_seed(seed, "heldout split"))
        num_heldout = min(MAX_HELDOUT, round(len(order) * HELDOUT_SHARE))
        if num_heldout < 1:
            raise RewardError(
                f"{directory} holds {len(order)} prompts: reinforcement learning needs enough to "
                "keep some aside; raise num_prompts or loosen the pass-rate selection"
            )
        self._heldout, self._training = order[:num_heldout], order[num_heldout:]

    @property
    def num_training(self) -> int:
        return len(self._training)

    @property
    def num_heldout(self) -> int:
        return len(self._heldout)

    def heldout(self, part: slice = slice(None)) -> list[Prompt]:
        """The prompts no update ever sees, or a part of them."""
        return [to_prompt(self._reader[int(i)]) for i in self._heldout[part]]

    def draw(self, position: int, count: int) -> list[Prompt]:
        """`count` training prompts from `position` on in an endless series of shuffled epochs."""
        return [to_prompt(self._reader[self._at(position + i)]) for i in range(count)]

    def check(self, judge: RoutingJudge, scheme: RewardScheme) -> None:
        """Raise RewardError naming the first prompt that neither rule nor judge can score."""
        table = read_table(self._directory, ["id", "meta"])
        for name, meta in zip(table["id"].to_pylist(), table["meta"].to_pylist(), strict=True):
            judge.check_prompt(name, json.loads(meta), scheme)

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, len(self._training))
        order = _permutation(len(self._training), derive_seed(self._seed, "epoch", epoch))
        return int(self._training[order[offset]])


def _permutation(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(size)


def to_prompt(sample: Sample) -> Prompt:
    """Read a prompt out of a sample: turns up to the last user turn, images, ground truth.

    The thinking suffix is added where the sample asks for thought and does not carry it yet.
    """
    meta = sample.meta
    messages = [dict(message) for message in sample.messages]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise RewardError(f"prompt {sample.id!r} has no user turn")
    last = messages[-1]["content"]
    think = bool(meta.get("think", THINKING_SUFFIX in last))
    if think and THINKING_SUFFIX not in last:
        messages[-1]["content"] = f"{last}\n{THINKING_SUFFIX}"
    return Prompt(
        id=sample.id,
        messages=messages,
        images=[decode_image(data) for data in sample.images],
        answer=str(meta["answer"]),
        check=str(meta["check"]),
        think=think,
        is_video=sample.is_video,
        skill=str(meta.get("skill", sample.task)),
        scene=meta.get("scene"),
    )


def sample_replies(
    model: SailVLForConditionalGeneration,
    processor: SailVLProcessor,
    prompts: Sequence[Prompt],
    settings: SamplingSettings,
    seed: int,
    first_index: int = 0,
) -> list[list[Completion]]:
    """`rollouts_per_prompt` replies to each prompt from the policy as it is.

    A reply depends on the seed and the number of its prompt alone, which counts from `first_index`.
    """
    return generate(
        model,
        processor,
        [Conversation(prompt.messages, prompt.images, prompt.is_video) for prompt in prompts],
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=seed,
        num_samples=settings.rollouts_per_prompt,
        first_index=first_index,
    )


def score_replies(
    prompts: Sequence[Prompt],
    replies: Sequence[Sequence[Completion]],
    settings: SamplingSettings,
    scheme: RewardScheme,
    judge: Judge,
) -> list[list[Rollout]]:
    """Groups of scored rollouts, in the order of the prompts."""
    groups: list[list[Rollout]] = []
    for group, (prompt, completions) in enumerate(zip(prompts, replies, strict=True)):
        scored = []
        for completion in completions:
            terms = score(prompt, completion.text, completion.finished, scheme, judge)
            penalty = overlong_penalty(
                len(completion.token_ids), settings.max_new_tokens, settings.overlong_buffer
            )
            reward = scheme.combine(terms) + penalty
            scored.append(Rollout(prompt, group, completion, terms, reward))
        groups.append(scored)
    return groups
