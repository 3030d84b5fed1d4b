"""Stage curation.heldout: single questions per skill on layouts that training never shows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from curation.world.build import heldout_samples
from sailyard.samples import SKILLS, Sample, write_samples

if TYPE_CHECKING:
    from sailyard.stage import StageContext


def run(ctx: StageContext) -> None:
    """The stage: nothing in, `world.heldout_per_skill` questions per skill out.

    The summary gives the majority class's share per skill: what one scores without looking.
    """
    per_skill = ctx.section("world").heldout_per_skill
    image_size = ctx.section("model.vision").image_size
    total = per_skill * len(SKILLS)
    answers: dict[str, Counter[str]] = defaultdict(Counter)

    def watched() -> Iterator[Sample]:
        samples = heldout_samples(per_skill, np.random.default_rng(ctx.seed), image_size)
        for done, sample in enumerate(samples, 1):
            answers[sample.meta["skill"]][sample.meta["answer"]] += 1
            ctx.progress(done, total, sample.meta["skill"])
            yield sample

    count = write_samples(ctx.output("heldout"), watched())
    majority = {skill: max(seen.values()) / per_skill for skill, seen in answers.items()}
    ctx.summary(num_samples=count, per_skill=per_skill, majority_class=majority)
