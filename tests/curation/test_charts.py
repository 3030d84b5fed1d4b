"""Charts of real tables: every kind reads back from its pixels, every fault is named."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from curation.charts import TooFewCharts, chart_samples, drafts, semantic_fault
from curation.oracle import score_caption
from curation.world.chart_text import caption_chart, chart_questions, chart_questions_zh
from curation.world.draw import encode
from curation.world.items import Item
from curation.world.plot_drawing import draw_chart, expected_values, measure_chart, reads_back
from curation.world.plots import KIND_NAMES, draft_chart, fault, sample_chart
from curation.world.tables import load_tables, unit_for
from sailyard.recipe.data import Charts
from sailyard.samples import check_sample


def test_values_are_the_tables_own_in_a_stated_unit() -> None:
    known = {(t.dataset, label, value) for t in load_tables() for label, value in t.rows}
    rng = np.random.default_rng(1)
    for _ in range(60):
        chart = sample_chart(rng)
        rows = zip(chart.labels, chart.raw, chart.values, strict=True)
        for label, raw, value in rows:
            assert (chart.dataset, label, raw) in known
            assert round(raw / chart.unit) == value
            assert 1 <= value <= 9


@pytest.mark.parametrize("values", [[1.0], [9.4, 2.0], [9.6, 1.0], [123456.0, 7.0], [0.003, 0.002]])
def test_units_bring_the_top_value_onto_the_axis(values: list[float]) -> None:
    top = max(values) / unit_for(values)
    assert 3.5 < top < 9.5


@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize("size", [84, 224])
def test_every_kind_reads_back_from_its_pixels(kind: str, size: int) -> None:
    rng = np.random.default_rng(2)
    for _ in range(12):
        chart = sample_chart(rng, kind=kind)
        image = draw_chart(chart, size)
        assert image.size == (size, size)
        assert reads_back(chart, image), (measure_chart(chart, image), expected_values(chart))


@pytest.mark.parametrize("kind", ["bar", "row", "line", "scatter", "area", "histogram"])
def test_a_picture_of_other_values_does_not_read_back(kind: str) -> None:
    chart = sample_chart(np.random.default_rng(3), kind=kind)
    other = tuple(v + 1 if v < 9 else v - 1 for v in chart.values)
    assert not reads_back(replace(chart, values=other), draw_chart(chart, 84))


def test_drafts_have_faults_that_are_named() -> None:
    rng = np.random.default_rng(4)
    seen = Counter(fault(draft_chart(rng, kind)) for kind in KIND_NAMES for _ in range(60))
    assert {"off_axis", "no_extreme", "overlap", "flat"} <= set(seen)


def test_the_semantic_check_names_what_does_not_fit() -> None:
    chart = sample_chart(np.random.default_rng(5), kind="bar")
    image = draw_chart(chart, 84)
    item = Item("charts", chart, (encode(image),), chart.meta())
    caption = caption_chart(chart)
    assert semantic_fault(chart, set(), item, image, caption) == ""
    assert semantic_fault(chart, {chart.key()}, item, image, caption) == "duplicate"
    wrong = replace(chart, unit=chart.unit * 3)
    assert semantic_fault(wrong, set(), item, image, caption) == "table_mismatch"
    blank = draw_chart(replace(chart, values=(0,) * len(chart.values)), 84)
    assert semantic_fault(chart, set(), item, blank, caption) == "unreadable"
    assert semantic_fault(chart, set(), item, image, "a picture") == "caption_mismatch"
    held = sample_chart(np.random.default_rng(6), kind="bar", heldout=True)
    picture = draw_chart(held, 84)
    other = Item("charts", held, (), held.meta())
    assert semantic_fault(held, set(), other, picture, caption_chart(held)) == "heldout"


def test_all_types_in_equal_shares_and_no_chart_twice() -> None:
    funnel: Counter[str] = Counter()
    charts = [c for _, c in drafts(Charts(), 45, np.random.default_rng(7), 84, funnel)]
    assert {c.kind for c in charts} == set(KIND_NAMES)
    assert max(Counter(c.kind for c in charts).values()) == 5
    assert len({c.key() for c in charts}) == 45
    assert funnel["drafted"] == 45 + sum(n for k, n in funnel.items() if k != "drafted")


def test_more_charts_than_exist_is_an_error_that_says_what_to_do() -> None:
    recipe = Charts(types=["heatmap"])
    small = drafts(recipe, 5, np.random.default_rng(8), 84, Counter({"drafted": 10_000}))
    with pytest.raises(TooFewCharts, match=r"world\.num_charts"):
        list(small)


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_captions_and_questions_in_both_languages(kind: str) -> None:
    rng = np.random.default_rng(9)
    chart = sample_chart(rng, kind=kind)
    assert score_caption(chart.meta(), caption_chart(chart)).ita == 5
    english, chinese = chart_questions(chart, rng, 3), chart_questions_zh(chart, rng, 3)
    assert len({qa.question for qa in english}) == len(english) == 3
    assert len({qa.question for qa in chinese}) == len(chinese) == 3
    assert all("\u4e00" <= qa.question[0] <= "\u9fff" for qa in chinese)
    image = draw_chart(chart, 84)
    item = Item("charts", chart, (encode(image),), chart.meta())
    for language in ("en", "zh"):
        for sample in chart_samples(item, chart, f"c-{language}", language, 3, rng):
            check_sample(sample)
            assert sample.meta["language"] == language
