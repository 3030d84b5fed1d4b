"""The published averages follow from the published rows (plain means)."""

from __future__ import annotations

import json
from statistics import mean

import pytest

from evaluation import paper_tables


@pytest.mark.parametrize(
    ("rows", "averages", "digits"),
    [
        (paper_tables.OPENCOMPASS, paper_tables.OPENCOMPASS_AVG, 2),
        (paper_tables.REASONING, paper_tables.REASONING_AVG, 1),
    ],
)
def test_averages(
    rows: dict[str, dict[str, float]], averages: dict[str, float], digits: int
) -> None:
    for name, scores in rows.items():
        assert mean(scores.values()) == pytest.approx(averages[name], abs=0.6 * 10**-digits)


def test_every_published_distance_falls() -> None:
    for rows in paper_tables.ALIGNMENT.values():
        assert all(after < before for before, after in rows.values())


def test_the_report_object_is_json() -> None:
    text = json.dumps(paper_tables.for_report())
    assert "70.31" in text
    assert "1.42" in text
