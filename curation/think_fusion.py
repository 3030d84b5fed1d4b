"""Stage curation.think_fusion: direct answers beside thoughts sampled from the RL policy.

Thoughts are harvested by rejection sampling: of several replies to a reasoning prompt those stay
that are finished, well formed, right, and whose chain holds by the rules of
`evaluation.soundness`; the best one per prompt is kept (paper section 4.2.4). "Best" is not
defined there: ours is the highest mean log-probability per token, the reply that the policy is
surest of. The thinking suffix stands on thought items only (spec A22).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from statistics import mean
from typing import TYPE_CHECKING

from curation.policy import Asked, ask_pool, is_reasoning, shuffled
from curation.spread import Input
from evaluation.answers import format_reward
from evaluation.soundness import check_chain
from model.generation import Completion
from sailyard.samples import Sample, SampleReader, write_samples

if TYPE_CHECKING:
    from sailyard.stage import StageContext


def verdict(reply: Completion, right: bool, prompt: Sample) -> str:
    """ "accepted", or the first reason to reject a reply."""
    if not reply.finished or not format_reward(reply.text):
        return "malformed"
    if not right:
        return "wrong"
    chain = check_chain(reply.text, prompt.messages[-1]["content"], prompt.meta.get("scene") or {})
    return "accepted" if chain.holds else "unsound"


def best_thought(asked: Asked, tally: Counter[str]) -> Sample | None:
    """The best accepted reply as a training item; None when every reply is rejected."""
    accepted: list[tuple[float, int, Completion]] = []
    for reply, right in zip(asked.replies, asked.right, strict=True):
        outcome = verdict(reply, right, asked.sample)
        tally[outcome] += 1
        if outcome == "accepted":
            # Ties go to the shorter chain.
            accepted.append((mean(reply.logprobs), -len(reply.token_ids), reply))
    if not accepted:
        return None
    _, _, reply = max(accepted, key=lambda entry: entry[:2])
    prompt = asked.sample
    return Sample(
        id=f"thought-{prompt.id}",
        source=prompt.source,
        task=prompt.task,
        messages=[*prompt.messages, {"role": "assistant", "content": reply.text.strip()}],
        images=prompt.images,
        is_video=prompt.is_video,
        meta={**prompt.meta, "think": True, "accepted_of": len(asked.replies)},
    )


def direct_items(instruction: SampleReader, wanted: int, seed: int) -> Iterator[Sample]:
    """`wanted` direct items, drawn without replacement (all of them when there are fewer)."""
    for position in sorted(shuffled(len(instruction), seed, 1)[:wanted]):
        sample = instruction[position]
        sample.id = f"direct-{sample.id}"
        sample.meta["think"] = False
        yield sample


def run(ctx: StageContext) -> None:
    """The stage: the RL policy, its pool and the instructions in, the fused set out."""
    recipe = ctx.section("curation.think_fusion")
    pool = SampleReader(ctx.input("prompts"))
    instruction = SampleReader(ctx.input("instruction"))
    wanted = round(recipe.num_samples * recipe.cot_fraction)
    thoughts: list[Sample] = []
    tally: Counter[str] = Counter()
    examined = 0
    if wanted:
        order = [p for p in shuffled(len(pool), ctx.seed) if is_reasoning(pool[p])]
        policy = Input.of(ctx, "checkpoint")
        for asked in ask_pool(policy, pool, order, recipe, ctx.seed):
            examined += 1
            thought = best_thought(asked, tally)
            if thought is not None:
                thoughts.append(thought)
            ctx.progress(len(thoughts), wanted, f"{examined} prompts tried")
            if len(thoughts) == wanted:
                break
    direct = list(direct_items(instruction, recipe.num_samples - wanted, ctx.seed))
    items = [*thoughts, *direct]
    order = shuffled(len(items), ctx.seed, 2)
    write_samples(ctx.output("fusion"), (items[position] for position in order))
    ctx.summary(
        thoughts=len(thoughts),
        direct=len(direct),
        cot_fraction=len(thoughts) / max(len(items), 1),
        cot_fraction_asked=recipe.cot_fraction,
        prompts_tried=examined,
        replies=dict(tally),
        acceptance=tally["accepted"] / max(sum(tally.values()), 1),
    )
