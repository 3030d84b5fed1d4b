"""Stage curation.charts: charts drawn by code from real tables, with captions and questions.

A draft is drawn from random rows and then has to earn its place: it must be readable (nothing
below the axis, points apart, one clear extreme), the values measured from its pixels must be the
table's, and the caption's claims must be the truth. What fails is dropped and counted by reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from curation.oracle import score_caption
from curation.world.chart_text import (
    PROMPTS,
    caption_chart,
    chart_questions,
    chart_questions_zh,
)
from curation.world.draw import encode
from curation.world.items import Item, qa_sample, user_turn
from curation.world.plot_drawing import draw_chart, reads_back
from curation.world.plots import Chart, draft_chart, fault
from curation.world.questions import QA
from curation.world.scene import in_heldout, pick
from sailyard.samples import Sample, write_samples

if TYPE_CHECKING:
    from sailyard.recipe.data import Charts
    from sailyard.stage import StageContext

# Drafts per wanted chart before giving up on a recipe that allows hardly any.
MAX_DRAFTS = 50


class TooFewCharts(ValueError):
    """The recipe asks for more different sound charts than drafting finds."""


def semantic_fault(chart: Chart, seen: set[str], item: Item, image: Any, caption: str) -> str:
    """Why a draft must go: a reason slug, or "" when it may stay.

    `caption` is the English one, whose claims the grammar can read.
    """
    if chart.key() in seen:
        return "duplicate"
    if in_heldout(chart.key()):
        return "heldout"
    if any(round(r / chart.unit) != v for r, v in zip(chart.raw, chart.values, strict=True)):
        return "table_mismatch"
    if not reads_back(chart, image):
        return "unreadable"
    if score_caption(item.truth, caption).ita < 5:
        return "caption_mismatch"
    return ""


def drafts(
    recipe: Charts, num: int, rng: np.random.Generator, image_size: int, funnel: Counter[str]
) -> Iterator[tuple[Item, Chart]]:
    """`num` different sound charts of the recipe's types in equal shares.

    Raises:
        TooFewCharts: drafting finds no more different charts.
    """
    kinds = [k for t in recipe.types for k in (("bar", "row") if t == "bar" else (t,))]
    seen: set[str] = set()
    kept = 0
    while kept < num:
        if funnel["drafted"] >= MAX_DRAFTS * num:
            raise TooFewCharts(
                f"only {kept} of {num} charts of types {', '.join(recipe.types)} are sound and "
                "different: lower world.num_charts or allow more curation.charts.types"
            )
        chart = draft_chart(rng, kinds[kept % len(kinds)])
        funnel["drafted"] += 1
        reason = fault(chart)
        if reason is None:
            image = draw_chart(chart, image_size)
            item = Item("charts", chart, (encode(image),), chart.meta())
            reason = semantic_fault(chart, seen, item, image, caption_chart(chart))
        if reason:
            funnel[reason] += 1
            continue
        seen.add(chart.key())
        kept += 1
        yield item, chart


def chart_samples(
    item: Item, chart: Chart, name: str, language: str, num_questions: int, rng: np.random.Generator
) -> list[Sample]:
    """A caption of one chart in one language, and its questions, each a sample of its own."""
    caption = caption_chart(chart, language)
    ask = chart_questions_zh if language == "zh" else chart_questions
    qas: list[QA] = ask(chart, rng, num_questions)
    meta = {"scene": item.truth, "caption": caption, "quality": "clean", "language": language}
    messages = [
        {"role": "user", "content": user_turn(item, pick(rng, PROMPTS[language]))},
        {"role": "assistant", "content": caption},
    ]
    described = Sample(f"{name}-cap", "charts", "caption", messages, list(item.images), meta=meta)
    asked = [qa_sample(f"{name}-qa{i}", item, [qa]) for i, qa in enumerate(qas)]
    for sample in asked:
        sample.meta["language"] = language
    return [described, *asked]


def run(ctx: StageContext) -> None:
    """The stage: nothing in, `world.num_charts` charts with captions and questions out."""
    recipe = ctx.section("curation.charts")
    num = ctx.section("world").num_charts
    image_size = ctx.section("model.vision").image_size
    rng = np.random.default_rng(ctx.seed)
    funnel: Counter[str] = Counter()
    kinds: Counter[str] = Counter()

    def samples() -> Iterator[Sample]:
        for i, (item, chart) in enumerate(drafts(recipe, num, rng, image_size, funnel)):
            language = recipe.languages[i % len(recipe.languages)]
            kinds[chart.kind] += 1
            ctx.progress(i + 1, num, chart.kind)
            yield from chart_samples(
                item, chart, f"chart-{i:06d}", language, recipe.questions_per_chart, rng
            )

    count = write_samples(ctx.output("charts"), samples())
    ctx.summary(num_samples=count, num_charts=num, funnel=dict(funnel), kinds=dict(kinds))
