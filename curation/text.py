"""Stage curation.text: pure text that grows the small language model and preserves it later."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from curation.world.shorthand import compounds
from curation.world.text import text_samples
from sailyard.samples import COMPOUNDS_FILE, Sample, write_samples

if TYPE_CHECKING:
    from sailyard.stage import StageContext


def run(ctx: StageContext) -> None:
    """The stage: nothing in, `world.num_text` conversations without images out.

    Beside them, which of their words stand for several others.
    """
    num = ctx.section("world").num_text
    kinds: Counter[str] = Counter()
    num_characters = 0

    def watched() -> Iterator[Sample]:
        nonlocal num_characters
        for done, sample in enumerate(text_samples(num, np.random.default_rng(ctx.seed)), 1):
            kinds[sample.meta["kind"]] += 1
            num_characters += sum(len(message["content"]) for message in sample.messages)
            ctx.progress(done, num)
            yield sample

    count = write_samples(ctx.output("text"), watched())
    words = json.dumps(compounds(), indent=0, sort_keys=True)
    (ctx.output("text") / COMPOUNDS_FILE).write_text(words + "\n", encoding="utf-8")
    ctx.summary(num_samples=count, kinds=dict(kinds), num_characters=num_characters)
