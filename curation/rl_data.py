"""Stage curation.rl_data: prompts that the current policy finds challenging yet solvable.

The policy answers each prompt of the pool four times. Perception prompts that it always gets
right are dropped; of the reasoning prompts also those that it never gets right (paper section
4.1.3). The pool is read in a seeded order until enough prompts are found.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from curation.policy import Asked, ask_pool, is_reasoning, rate_histogram, shuffled
from curation.spread import Input
from sailyard.samples import Sample, SampleReader, write_samples

if TYPE_CHECKING:
    from sailyard.stage import StageContext

TOO_EASY, TOO_HARD, KEPT = "always right", "never right", "kept"


class NoPrompts(ValueError):
    """The policy leaves nothing to learn from."""


def fate(asked: Asked) -> str:
    """Why a prompt stays or goes."""
    if asked.pass_rate == 1.0:
        return TOO_EASY
    if asked.pass_rate == 0.0 and is_reasoning(asked.sample):
        return TOO_HARD
    return KEPT


def kept_prompt(asked: Asked) -> Sample:
    """The prompt with the policy's success rate in its meta."""
    asked.sample.meta["pass_rate"] = asked.pass_rate
    return asked.sample


def run(ctx: StageContext) -> None:
    """The stage: a checkpoint and the pool in, RL prompts out."""
    recipe = ctx.section("curation.rl_data")
    pool = SampleReader(ctx.input("rl_pool"))
    fates: dict[str, Counter[str]] = defaultdict(Counter)
    rates: dict[str, list[float]] = {"perception": [], "reasoning": []}
    chosen: list[Sample] = []
    order = shuffled(len(pool), ctx.seed)
    policy = Input.of(ctx, "checkpoint")
    for number, asked in enumerate(ask_pool(policy, pool, order, recipe, ctx.seed)):
        outcome = fate(asked)
        fates[asked.sample.meta.get("skill", asked.sample.task)][outcome] += 1
        rates["reasoning" if is_reasoning(asked.sample) else "perception"].append(asked.pass_rate)
        if outcome == KEPT:
            chosen.append(kept_prompt(asked))
        ctx.progress(number + 1, len(pool), f"{len(chosen)} of {recipe.num_prompts} kept")
        if len(chosen) == recipe.num_prompts:
            break
    if not chosen:
        raise NoPrompts(
            f"none of {len(pool)} prompts is challenging yet solvable for this policy: train "
            "post_training.longcot_sft longer or raise world.num_rl_prompts"
        )
    write_samples(ctx.output("prompts"), chosen)
    ctx.summary(**report(chosen, fates, rates))


def report(
    chosen: list[Sample], fates: dict[str, Counter[str]], rates: dict[str, list[float]]
) -> dict[str, Any]:
    """The funnel, JSON-able."""
    totals: Counter[str] = Counter()
    for counts in fates.values():
        totals.update(counts)
    return {
        "examined": sum(totals.values()),
        "kept": len(chosen),
        "always_right": totals[TOO_EASY],
        "never_right": totals[TOO_HARD],
        "rewritten_choices": sum("rewritten_from" in sample.meta for sample in chosen),
        "by_skill": {skill: dict(counts) for skill, counts in sorted(fates.items())},
        "pass_rates": {kind: rate_histogram(values) for kind, values in rates.items()},
    }
