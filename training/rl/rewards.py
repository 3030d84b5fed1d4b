"""What a rollout earns: answer, think and format terms, and the ways to combine them.

Every term is binary but the think term of the cascade, which is the mean of three binary
verdicts. Sources: paper sections 4.2.3 (verifiable) and 4.2.5 (mixed); SAIL-RL section 3 (cascade).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from evaluation.answers import (
    THINK_CLOSE,
    THINK_OPEN,
    boxed_contents,
    extract_thinking,
    format_reward,
    is_correct,
)

WEIGHT_TOLERANCE = 1e-6


class RewardError(ValueError):
    """A prompt cannot be scored, or the weights do not make a reward."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question of the RL set.

    messages: the turns before the reply; images: decoded, in placeholder order. answer and check
    name the ground truth and its rule ("exact", "number", "box", "math", or "open" for a judge
    model). think: whether the prompt asks for a think block. scene: the image's ground truth
    where it is known.
    """

    id: str
    messages: list[dict[str, str]]
    images: list[Image.Image]
    answer: str
    check: str
    think: bool
    is_video: bool = False
    skill: str = ""
    scene: Any = None

    @property
    def question(self) -> str:
        """The last user turn."""
        return next(m["content"] for m in reversed(self.messages) if m["role"] == "user")


@dataclass(frozen=True, slots=True)
class ThinkVerdict:
    """The three dimensions of the thinking reward (SAIL-RL section 3.1).

    sound: no logical or arithmetic slip. grounded: no claim contradicts the image. consistent:
    the answer follows from the reasoning, whether or not it is right.
    """

    sound: bool
    grounded: bool
    consistent: bool

    @property
    def holistic(self) -> float:
        """SAIL-VL2's single 0/1: all three hold."""
        return float(self.sound and self.grounded and self.consistent)

    @property
    def mean(self) -> float:
        """SAIL-RL's (d1 + d2 + d3) / 3."""
        return (self.sound + self.grounded + self.consistent) / 3


ALL_GOOD = ThinkVerdict(sound=True, grounded=True, consistent=True)
ALL_BAD = ThinkVerdict(sound=False, grounded=False, consistent=False)


class Judge(Protocol):
    """Judges what no rule decides: the reasoning, and answers to open questions."""

    def thinking(self, prompt: Prompt, reply: str) -> ThinkVerdict:
        """Verdict on a non-empty think block."""
        ...

    def answer(self, prompt: Prompt, reply: str) -> bool:
        """Whether the reply answers an open question as the reference does."""
        ...


@dataclass(frozen=True, slots=True)
class RewardTerms:
    """What one reply scored.

    mode: 1 when it thought exactly where the prompt asks for it (SAIL-RL's judging reward; the
    label is the prompt's own, since SAIL-VL2 switches thinking by the prompt alone).
    """

    answer: float
    format: float
    mode: float
    verdict: ThinkVerdict = field(default=ALL_GOOD)


@dataclass(frozen=True, slots=True)
class RewardScheme:
    """How the terms become one number in [0, 1]; the weights sum to 1.

    With `cascade` the reward is a * (mode * think * answer) + (1 - a) * format with
    a = 1 - format_weight, think being the mean of the three verdicts (SAIL-RL section 3.3,
    a = 0.9). Without it, the weighted sum of SAIL-VL2 with the holistic think term.
    """

    answer_weight: float = 0.9
    think_weight: float = 0.0
    format_weight: float = 0.1
    cascade: bool = False

    def __post_init__(self) -> None:
        weights = {
            "answer_weight": self.answer_weight,
            "think_weight": self.think_weight,
            "format_weight": self.format_weight,
        }
        for name, weight in weights.items():
            if weight < 0.0:
                raise RewardError(f"{name} is {weight}: reward weights are not negative")
        total = sum(weights.values())
        if abs(total - 1.0) > WEIGHT_TOLERANCE:
            raise RewardError(f"reward weights {weights} sum to {total:g}: make them sum to 1")

    @property
    def uses_thinking(self) -> bool:
        """Whether the think verdict can change the reward (a judge may cost a call)."""
        return self.cascade or self.think_weight > 0.0

    def combine(self, terms: RewardTerms) -> float:
        """The scalar reward of a reply, in [0, 1]."""
        if self.cascade:
            product = terms.mode * terms.verdict.mean * terms.answer
            return (1.0 - self.format_weight) * product + self.format_weight * terms.format
        return (
            self.answer_weight * terms.answer
            + self.think_weight * terms.verdict.holistic
            + self.format_weight * terms.format
        )


def score(
    prompt: Prompt, reply: str, finished: bool, scheme: RewardScheme, judge: Judge
) -> RewardTerms:
    """Score one reply.

    finished: it ended by itself, not at the token budget; an unfinished reply is not well formed.
    A direct prompt that gets a direct answer has the think term 1: nothing was asked for and
    nothing is wrong (spec A18, our choice). A block that is missing where it is asked for, or
    present where it is not, scores 0.
    """
    mode = mode_is_right(prompt, reply)
    if not mode:
        verdict = ALL_BAD
    elif prompt.think and scheme.uses_thinking:
        verdict = judge.thinking(prompt, reply)
    else:
        verdict = ALL_GOOD
    return RewardTerms(
        answer=float(answer_is_right(prompt, reply, judge)),
        format=float(finished and format_is_right(prompt, reply)),
        mode=float(mode),
        verdict=verdict,
    )


def mode_is_right(prompt: Prompt, reply: str) -> bool:
    """A closed, filled think block where thought is asked for; none, or an empty one, elsewhere."""
    thought = bool(extract_thinking(reply))
    return thought and THINK_CLOSE in reply if prompt.think else not thought


def answer_is_right(prompt: Prompt, reply: str, judge: Judge) -> bool:
    """Rule check of the answer; where thinking is asked for, only a \\boxed{} counts."""
    if prompt.think and not boxed_contents(reply):
        return False
    if prompt.check == "open":
        return judge.answer(prompt, reply)
    return is_correct(reply, prompt.answer, prompt.check)


def format_is_right(prompt: Prompt, reply: str) -> bool:
    """Thinking prompts: <think>...</think> then \\boxed{}. Direct ones: text, no think tags."""
    if prompt.think:
        return format_reward(reply)
    return bool(reply.strip()) and THINK_OPEN not in reply and THINK_CLOSE not in reply
