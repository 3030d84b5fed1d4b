"""Stage curation.mixed_rl_data: hard reasoning prompts beside general ones.

Hard prompts are reasoning prompts on which the present policy does poorly: at most half of its
replies are right (paper section 4.1.3 says "poorly" without a number; one half is our choice).
When there are too few, the rest comes from those it sometimes fails. Prompts that it never
solves teach nothing by comparison, so they come last. General prompts are drawn from all
perception items of the pool and are asked for a direct answer.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from curation.policy import Asked, as_prompt, ask_pool, is_reasoning, rate_histogram, shuffled
from curation.rl_data import NoPrompts, kept_prompt
from curation.spread import Input
from sailyard.samples import Sample, SampleReader, write_samples

if TYPE_CHECKING:
    from sailyard.stage import StageContext

POOR = 0.5


def hardness(asked: Asked) -> tuple[int, float]:
    """Sort key: poorly solved first, then sometimes failed, then never solved."""
    rate = asked.pass_rate
    if 0.0 < rate <= POOR:
        return (0, rate)
    return (1, rate) if rate > POOR else (2, rate)


def run(ctx: StageContext) -> None:
    """The stage: the policy and the pool in, prompts of mixed RL out."""
    recipe = ctx.section("curation.mixed_rl_data")
    pool = SampleReader(ctx.input("rl_pool"))
    reasoning, perception = _split(pool, ctx.seed)
    wanted_hard = round(recipe.num_prompts * recipe.hard_fraction)
    candidates: list[Asked] = []
    rates: list[float] = []
    poor = 0
    for asked in ask_pool(Input.of(ctx, "checkpoint"), pool, reasoning, recipe, ctx.seed):
        rates.append(asked.pass_rate)
        if asked.pass_rate < 1.0:
            candidates.append(asked)
            poor += 0.0 < asked.pass_rate <= POOR
        ctx.progress(len(rates), len(reasoning), f"{poor} of {wanted_hard} hard prompts")
        if poor == wanted_hard:
            break
    candidates.sort(key=hardness)
    hard = [kept_prompt(asked) for asked in candidates[:wanted_hard]]
    general = [
        as_prompt(pool[position], think=False)
        for position in perception[: recipe.num_prompts - wanted_hard]
    ]
    if not hard and not general:
        raise NoPrompts(
            f"none of {len(pool)} prompts is left for mixed RL: raise world.num_rl_prompts"
        )
    mixed = _interleave(hard, general, ctx.seed)
    write_samples(ctx.output("prompts"), mixed)
    ctx.summary(
        hard=len(hard),
        general=len(general),
        hard_asked=wanted_hard,
        examined=len(rates),
        pass_rates=rate_histogram(rates),
        by_skill=dict(Counter(s.meta.get("skill", s.task) for s in mixed)),
    )


def _split(pool: SampleReader, seed: int) -> tuple[list[int], list[int]]:
    order = shuffled(len(pool), seed)
    reasoning = {position for position in order if is_reasoning(pool[position])}
    return [p for p in order if p in reasoning], [p for p in order if p not in reasoning]


def _interleave(hard: list[Sample], general: list[Sample], seed: int) -> list[Sample]:
    both = [*hard, *general]
    return [both[position] for position in shuffled(len(both), seed, 1)]
