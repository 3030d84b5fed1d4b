"""The two reinforcement stages: sample, score, compare inside groups, update, repeat.

A step is a pure function of the weights, the optimizer state and a few counters; all of them
are in a checkpoint, so a killed stage resumes to the same final weights.

Several ranks share a step's prompts, and each samples, scores and learns from its own; what they
know of each other is the size of a mini-batch, the gradient and the figures that are reported. A
reply depends on the number of its prompt and not on its rank, so the run is that of one rank.
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
from model.modeling import SailVLForConditionalGeneration, part_digests
from sailyard.recipe import RLRecipe
from sailyard.stage import RankDone, StageContext
from training.averaging import write_record
from training.engine import StepResult
from training.guard import Diverged, Guard, within_memory
from training.loop import TrainingLoop
from training.rl.api_judge import ApiJudge
from training.rl.judges import RoutingJudge
from training.rl.losses import group_advantages
from training.rl.policy import Policy, Response, UpdateStats, encode_response
from training.rl.rewards import Judge, Prompt, RewardScheme
from training.rl.rollouts import (
    PromptSet,
    Rollout,
    SamplingSettings,
    derive_seed,
    sample_replies,
    score_replies,
)

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

    position: prompts drawn so far. history: the metrics of every good step.
    """

    step: int = 0
    position: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    heldout_before: dict[str, float] = field(default_factory=dict)
    digests_before: dict[str, str] = field(default_factory=dict)
    guard: dict[str, Any] = field(default_factory=dict)


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
        digests = part_digests(model)
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
        self.state = RunState(digests_before=digests)
        self.guard = Guard(recipe.max_bad_steps, None)
        self.world = self.policy.world
        self.loop = TrainingLoop(
            ctx,
            self.policy.learner,
            self.world,
            total_steps=recipe.steps,
            checkpoint_every=recipe.checkpoint_every,
            timeout_s=recipe.step_timeout_s,
        )

    def run(self) -> dict[str, Any]:
        """Train to the last step, from the newest checkpoint if there is one; the summary.

        Raises StopRequested after saving when the stage was asked to stop, RankDone on every rank
        but 0.
        """
        resumed = self.loop.resume()
        if resumed is not None:
            self._load(resumed[0])
        if not self.state.heldout_before:
            self.state.heldout_before = self._measure_heldout("before")
        started, first = time.monotonic(), self.state.step
        self.loop.run(self._one_step, self._state)
        seconds = (time.monotonic() - started) / max(self.recipe.steps - first, 1)
        after = self._measure_heldout("after")
        whole = self.policy.learner.whole()
        assert isinstance(whole, SailVLForConditionalGeneration)
        self.policy.model = whole
        if self.world.rank.number:
            raise RankDone
        return self._summary(after, seconds)

    def _one_step(self, _step: int) -> None:
        state = self.state
        groups, responses = self._collect()
        ids = [rollout.prompt.id for group in groups for rollout in group[:1]]
        stats = within_memory(
            lambda: self.policy.improve(
                list(responses.values()),
                self.recipe.lr * self._warmup(),
                np.random.default_rng(derive_seed(self.ctx.seed, state.step, "mini-batches")),
                list(responses),
            ),
            lambda: (
                f"the updates of step {state.step} do not fit into memory; its prompts are {ids}"
            ),
        )
        metrics = {
            **self._reward_metrics(groups),
            **self._update_metrics(groups, len(responses), stats),
        }
        if self._go_on(ids, stats):
            state.step += 1
            if stats.finite:
                state.history.append(metrics)
            self.ctx.metric(state.step - 1, **metrics)
            note = f"reward {metrics['reward']:.3f} accuracy {metrics['accuracy']:.2f}"
            self.ctx.progress(state.step, self.recipe.steps, note)

    def _go_on(self, ids: Sequence[str], stats: UpdateStats) -> bool:
        """Whether a step stands; else the run is at its last checkpoint, with new prompts ahead."""
        step, position = self.state.step, self.state.position
        result = StepResult(
            loss=stats.losses[-1] if stats.losses else 0.0,
            grad_norm=stats.grad_norms[-1] if stats.grad_norms else 0.0,
            aux_loss=0.0,
            source_loss={},
            part_norms={},
            num_labels=stats.num_tokens,
            router={},
        )
        if self.guard.judge(step, result, ids) != "roll back":
            if stats.finite and (step + 1) % self.recipe.checkpoint_every == 0:
                self.guard.passed_checkpoint()
            return True
        guard, complaint = self.guard.dump(), self.guard.complaint(step, result)
        saved = self.loop.roll_back()
        if saved is None:
            raise Diverged(f"{complaint}; there is no checkpoint yet to go back to")
        self._load(saved[0])
        self.state.position = position
        self.guard.load(guard)
        self.guard.went_back()
        return False

    def _state(self) -> dict[str, Any]:
        self.state.guard = self.guard.dump()
        return asdict(self.state)

    def _load(self, saved: Mapping[str, Any]) -> None:
        self.state = RunState(**saved)
        self.guard.load(self.state.guard)

    def _collect(self) -> tuple[list[list[Rollout]], dict[tuple[int, int], list[Response]]]:
        """This rank's groups sampled in this step, and those to learn from, by round and prompt."""
        groups: list[list[Rollout]] = []
        responses: dict[tuple[int, int], list[Response]] = {}
        wanted = self.recipe.prompts_per_step
        for number in range(MAX_SAMPLING_ROUNDS if self.recipe.dynamic_sampling else 1):
            if wanted == 0:
                break
            mine = self.world.share(wanted)
            prompts = self.prompts.draw(self.state.position + mine.start, mine.stop - mine.start)
            self.state.position += wanted
            seed = derive_seed(self.ctx.seed, self.state.step, number, "rollouts")
            sampled = self._sample(prompts, seed, mine.start)
            groups += sampled
            kept = self._to_responses(sampled)
            responses |= {(number, mine.start + place): group for place, group in kept.items()}
            wanted -= int(self.world.sum([len(kept)])[0])
        return groups, responses

    def _sample(self, prompts: Sequence[Prompt], seed: int, first: int) -> list[list[Rollout]]:
        """Scored replies to prompts that count from `first`."""
        with self.policy.learner.precision():
            replies = sample_replies(
                self.policy.model, self.processor, prompts, self.sampling, seed, first
            )
        return score_replies(prompts, replies, self.sampling, self.scheme, self.judge)

    def _to_responses(self, groups: Sequence[Sequence[Rollout]]) -> dict[int, list[Response]]:
        """The groups to learn from, by their place among `groups`."""
        if not groups:
            return {}
        rewards_GK = torch.tensor([[rollout.reward for rollout in group] for group in groups])
        result = group_advantages(rewards_GK, self.recipe.dynamic_sampling)
        return {
            place: [
                encode_response(
                    self.processor, rollout.prompt, rollout.completion, float(advantage)
                )
                for rollout, advantage in zip(group, advantages_K, strict=True)
            ]
            for place, (group, advantages_K, keep) in enumerate(
                zip(groups, result.advantages_GK, result.keep_G, strict=True)
            )
            if keep
        }

    def _warmup(self) -> float:
        return min(1.0, (self.state.step + 1) / math.ceil(WARMUP_SHARE * self.recipe.steps))

    def _measure_heldout(self, when: str) -> dict[str, float]:
        """Means over the held-out prompts, sampled as in training and with the same seed."""
        mine = self.world.share(self.prompts.num_heldout)
        seed = derive_seed(self.ctx.seed, "heldout rollouts")
        figures = self._reward_metrics(self._sample(self.prompts.heldout(mine), seed, mine.start))
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
            "ranks": self.world.size,
            "bad_steps": self.guard.state.num_bad,
            "roll_backs": self.guard.state.num_roll_backs,
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

    def _reward_metrics(self, groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
        """Means over all ranks' rollouts: reward, accuracy, format_rate; response_length in tokens;
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
        if self.scheme.uses_thinking:
            columns["think_score"] = [r.terms.verdict.mean for r in rollouts if r.prompt.think]
        parts = self.world.gather(columns)
        whole = {name: [value for part in parts for value in part[name]] for name in columns}
        return {name: float(np.mean(values)) for name, values in whole.items() if values}

    def _update_metrics(
        self, groups: Sequence[Sequence[Rollout]], num_kept: int, stats: UpdateStats
    ) -> dict[str, float]:
        """Entropy in nats per token, groups sampled and kept, and what the updates measured.

        Entropy is the Monte Carlo estimate -mean log p of the sampled tokens: unbiased, and free.
        """
        logprobs = [p for group in groups for r in group for p in r.completion.logprobs]
        total, count, sampled, kept = self.world.sum(
            [float(np.sum(logprobs)), len(logprobs), len(groups), num_kept]
        )
        return {
            "entropy": -total / count,
            "sampled_groups": sampled,
            "kept_groups": kept,
            "updates": float(stats.num_updates),
            **stats.metrics(),
        }


def _edges(history: Sequence[Mapping[str, float]], name: str, edge: int) -> dict[str, float]:
    return {
        f"{name}_first": float(np.mean([step[name] for step in history[:edge]])),
        f"{name}_last": float(np.mean([step[name] for step in history[-edge:]])),
    }
