"""The two reinforcement stages: sample, score, compare inside groups, update, repeat.

A step is a pure function of the weights, the optimizer state and a few counters; all of them
are in a checkpoint, so a killed stage resumes to the same final weights.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from model.checkpoint import load_model, save_model
from model.modeling import part_digests
from sailyard.recipe import RLRecipe
from sailyard.stage import StageContext
from training.loop import TrainingLoop
from training.rl.api_judge import ApiJudge
from training.rl.judges import RoutingJudge
from training.rl.losses import group_advantages
from training.rl.policy import Policy, Response, UpdateStats, encode_response
from training.rl.rewards import Judge, RewardScheme
from training.rl.rollouts import (
    PromptSet,
    Rollout,
    SamplingSettings,
    derive_seed,
    sample_replies,
    score_replies,
)
from training.soup import write_record

WARMUP_SHARE = 0.1
"""Share of the steps in which the rate climbs; constant afterwards (our choice)."""
MAX_SAMPLING_ROUNDS = 2
"""Rounds of rollouts in one step at most, when dynamic sampling looks for groups that differ.
DAPO samples until the batch is full; a bound keeps a step's time predictable (our choice)."""
EDGE_SHARE = 0.2
"""`reward_first` and `reward_last` are means over this share of the steps (our choice)."""


def run_verifiable(ctx: StageContext) -> None:
    """Stage `post_training.verifiable_rl`: rewards that a rule can check (paper 4.2.3)."""
    _run(ctx)


def run_mixed(ctx: StageContext) -> None:
    """Stage `post_training.mixed_rl`: answer, thought and format together (paper 4.2.5)."""
    _run(ctx)


def _run(ctx: StageContext) -> None:
    recipe: RLRecipe = ctx.section(ctx.stage_name)
    run = ReinforcementRun(ctx, recipe, _api_judge(recipe))
    ctx.summary(**run.run())
    output = ctx.output("checkpoint")
    save_model(output, run.policy.model, run.processor)
    data = {name: ctx.input_digest(name) for name in ctx.input_names if name != "checkpoint"}
    write_record(
        output,
        {
            "parent": ctx.input_digest("checkpoint"),
            "recipe": recipe.model_dump(mode="json"),
            "data": data,
        },
    )


@dataclass(slots=True)
class RunState:
    """What a run remembers besides weights and optimizer; JSON-able.

    position: prompts drawn so far. history: the metrics of every step.
    """

    step: int = 0
    position: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    heldout_before: dict[str, float] = field(default_factory=dict)
    digests_before: dict[str, str] = field(default_factory=dict)


def _api_judge(recipe: RLRecipe) -> Judge | None:
    if not recipe.judge_api_base:
        return None
    key = os.environ.get("OPENAI_API_KEY", "none")  # servers without keys take any
    return ApiJudge(recipe.judge_api_base, recipe.judge_api_model, key)


class ReinforcementRun:
    """One stage of reinforcement learning on a set of prompts.

    judge_model judges what no rule can; without it, prompts that need one are refused.
    """

    def __init__(
        self,
        ctx: StageContext,
        recipe: RLRecipe,
        judge_model: Judge | None = None,
    ) -> None:
        torch.set_num_threads(recipe.threads)
        self.ctx, self.recipe = ctx, recipe
        model, self.processor = load_model(ctx.input("checkpoint"))
        self.policy = Policy(model, recipe)
        self.scheme = RewardScheme(
            recipe.answer_weight, recipe.think_weight, recipe.format_weight, recipe.cascade
        )
        self.judge = RoutingJudge(judge_model)
        self.prompts = PromptSet(ctx.input("prompts"), ctx.seed)
        self.prompts.check(self.judge, self.scheme)
        self.sampling = SamplingSettings(
            recipe.rollouts_per_prompt,
            recipe.max_new_tokens,
            recipe.temperature,
            recipe.overlong_buffer,
        )
        self.state = RunState(digests_before=part_digests(model))
        self.loop = TrainingLoop(
            ctx,
            self.policy.learner,
            self.policy.learner.world,
            total_steps=recipe.steps,
            checkpoint_every=recipe.checkpoint_every,
        )

    def run(self) -> dict[str, Any]:
        """Train to the last step, from the newest checkpoint if there is one; the summary.

        Raises StopRequested after saving when the stage was asked to stop.
        """
        resumed = self.loop.resume()
        if resumed is not None:
            self.state = RunState(**resumed[0])
        if not self.state.heldout_before:
            self.state.heldout_before = self._measure_heldout("before")
        started, first = time.monotonic(), self.state.step
        self.loop.run(self._one_step, lambda: asdict(self.state))
        seconds = (time.monotonic() - started) / max(self.recipe.steps - first, 1)
        return self._summary(self._measure_heldout("after"), seconds)

    def _one_step(self, _step: int) -> None:
        state = self.state
        groups, responses = self._collect()
        stats = self.policy.improve(
            responses,
            self.recipe.lr * self._warmup(),
            np.random.default_rng(derive_seed(self.ctx.seed, state.step, "mini-batches")),
        )
        metrics = {
            **_reward_metrics(groups, self.scheme),
            **_update_metrics(groups, responses, stats),
        }
        state.step += 1
        state.history.append(metrics)
        self.ctx.metric(state.step - 1, **metrics)
        note = f"reward {metrics['reward']:.3f} accuracy {metrics['accuracy']:.2f}"
        self.ctx.progress(state.step, self.recipe.steps, note)

    def _collect(self) -> tuple[list[list[Rollout]], list[list[Response]]]:
        """All groups sampled in this step, and those to learn from."""
        groups: list[list[Rollout]] = []
        responses: list[list[Response]] = []
        rounds = MAX_SAMPLING_ROUNDS if self.recipe.dynamic_sampling else 1
        for number in range(rounds):
            wanted = self.recipe.prompts_per_step - len(responses)
            if wanted == 0:
                break
            prompts = self.prompts.draw(self.state.position, wanted)
            self.state.position += wanted
            seed = derive_seed(self.ctx.seed, self.state.step, number, "rollouts")
            with self.policy.learner.precision():
                replies = sample_replies(
                    self.policy.model, self.processor, prompts, self.sampling, seed
                )
            sampled = score_replies(prompts, replies, self.sampling, self.scheme, self.judge)
            groups += sampled
            responses += self._to_responses(sampled)
        return groups, responses

    def _to_responses(self, groups: Sequence[Sequence[Rollout]]) -> list[list[Response]]:
        rewards_GK = torch.tensor([[rollout.reward for rollout in group] for group in groups])
        result = group_advantages(rewards_GK, self.recipe.dynamic_sampling)
        return [
            [
                encode_response(
                    self.processor, rollout.prompt, rollout.completion, float(advantage)
                )
                for rollout, advantage in zip(group, advantages_K, strict=True)
            ]
            for group, advantages_K, keep in zip(
                groups, result.advantages_GK, result.keep_G, strict=True
            )
            if keep
        ]

    def _warmup(self) -> float:
        return min(1.0, (self.state.step + 1) / math.ceil(WARMUP_SHARE * self.recipe.steps))

    def _measure_heldout(self, when: str) -> dict[str, float]:
        """Means over the held-out prompts, sampled as in training and with the same seed."""
        prompts = self.prompts.heldout()
        with self.policy.learner.precision():
            replies = sample_replies(
                self.policy.model,
                self.processor,
                prompts,
                self.sampling,
                derive_seed(self.ctx.seed, "heldout rollouts"),
            )
        groups = score_replies(prompts, replies, self.sampling, self.scheme, self.judge)
        figures = _reward_metrics(groups, self.scheme)
        self.ctx.progress(
            self.state.step, self.recipe.steps, f"held-out {when}: reward {figures['reward']:.3f}"
        )
        return figures

    def _summary(self, heldout_after: Mapping[str, float], seconds: float) -> dict[str, Any]:
        history = self.state.history
        edge = max(1, round(EDGE_SHARE * len(history)))
        before = self.state.heldout_before
        after = part_digests(self.policy.model)
        frozen = [part for part in after if part not in self.recipe.trainable]
        changed = [part for part in frozen if after[part] != self.state.digests_before[part]]
        if changed:
            raise RuntimeError(f"frozen parts changed during {self.ctx.stage_name}: {changed}")
        return {
            "algorithm": self.policy.algorithm,
            "steps": len(history),
            "seconds_per_step": seconds,
            "num_prompts": self.prompts.num_training,
            "num_heldout_prompts": self.prompts.num_heldout,
            **_edges(history, "reward", edge),
            **_edges(history, "accuracy", edge),
            **_edges(history, "format_rate", edge),
            **_edges(history, "response_length", edge),
            **{f"heldout_{name}_before": value for name, value in before.items()},
            **{f"heldout_{name}_after": value for name, value in heldout_after.items()},
            "trainable": list(self.recipe.trainable),
            "frozen_parts_unchanged": True,
            "part_digests_before": self.state.digests_before,
            "part_digests_after": after,
        }


def _edges(history: Sequence[Mapping[str, float]], name: str, edge: int) -> dict[str, float]:
    return {
        f"{name}_first": float(np.mean([step[name] for step in history[:edge]])),
        f"{name}_last": float(np.mean([step[name] for step in history[-edge:]])),
    }


def _reward_metrics(groups: Sequence[Sequence[Rollout]], scheme: RewardScheme) -> dict[str, float]:
    """Means over all rollouts: reward, accuracy, format_rate; response_length in tokens;
    truncated, the share cut off by the token budget; think_score, over the prompts that ask for
    thought, where the reward looks at it."""
    rollouts = [rollout for group in groups for rollout in group]
    columns: dict[str, list[float]] = {
        "reward": [r.reward for r in rollouts],
        "accuracy": [r.terms.answer for r in rollouts],
        "format_rate": [r.terms.format for r in rollouts],
        "response_length": [len(r.completion.token_ids) for r in rollouts],
        "truncated": [float(not r.completion.finished) for r in rollouts],
    }
    thoughts = [r.terms.verdict.mean for r in rollouts if r.prompt.think]
    if scheme.uses_thinking and thoughts:
        columns["think_score"] = thoughts
    return {name: float(np.mean(values)) for name, values in columns.items()}


def _update_metrics(
    groups: Sequence[Sequence[Rollout]],
    responses: Sequence[Sequence[Response]],
    stats: UpdateStats,
) -> dict[str, float]:
    """Entropy in nats per token, groups sampled and kept, and what the updates measured.

    Entropy is the Monte Carlo estimate -mean log p of the sampled tokens: unbiased, and free.
    """
    logprobs = [p for group in groups for r in group for p in r.completion.logprobs]
    return {
        "entropy": -float(np.mean(logprobs)),
        "sampled_groups": float(len(groups)),
        "kept_groups": float(len(responses)),
        "updates": float(stats.num_updates),
        **stats.metrics(),
    }
