"""Who judges reasoning: rules where the scene's truth is known, a judge model elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evaluation.answers import CHECKS
from evaluation.soundness import check_chain
from training.rl.rewards import Judge, Prompt, RewardError, RewardScheme, ThinkVerdict

OPEN = "open"


class RoutingJudge:
    """Rules for prompts with a known scene, `model` (if there is one) for all others."""

    def __init__(self, model: Judge | None = None) -> None:
        self._model = model

    def thinking(self, prompt: Prompt, reply: str) -> ThinkVerdict:
        """By rule where `prompt.scene` is known."""
        if prompt.scene is not None:
            verdict = check_chain(reply, prompt.question, prompt.scene)
            return ThinkVerdict(verdict.sound, verdict.grounded, verdict.consistent)
        return self._require(prompt.id).thinking(prompt, reply)

    def answer(self, prompt: Prompt, reply: str) -> bool:
        """By the model: this is asked only where no rule applies."""
        return self._require(prompt.id).answer(prompt, reply)

    def check_prompt(self, prompt_id: str, meta: Mapping[str, Any], scheme: RewardScheme) -> None:
        """Raise RewardError if a prompt with this ground truth could not be scored.

        Asked for every prompt before the first step: the thousandth rollout is too late.
        """
        if "answer" not in meta or "check" not in meta:
            raise RewardError(f"prompt {prompt_id!r} has no 'answer' and 'check' in its meta")
        check = meta["check"]
        if check != OPEN and check not in CHECKS:
            raise RewardError(
                f"prompt {prompt_id!r} asks for the check {check!r}; "
                f"there are {', '.join([*CHECKS, OPEN])}"
            )
        by_rule = not (scheme.uses_thinking and meta.get("think")) or meta.get("scene") is not None
        if check == OPEN or not by_rule:
            self._require(prompt_id)

    def _require(self, prompt_id: str) -> Judge:
        if self._model is None:
            raise RewardError(
                f"prompt {prompt_id!r} can only be scored by a judge model (an open answer, or "
                "reasoning about an image whose truth is unknown): configure one, or leave such "
                "prompts out of this stage"
            )
        return self._model
