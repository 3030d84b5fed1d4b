"""The best constant answer, over every kind of check."""

from __future__ import annotations

import pytest

from evaluation.baselines import majority, majority_per_skill

BOX = "<box>({},{}),({},{})</box>"


def test_majority_of_words_and_numbers() -> None:
    best = majority(["yes", "no", "Yes.", "yes"], "exact")
    assert (best.answer, best.accuracy) == ("yes", 0.75)
    assert majority(["3", "3.0", "4", "3"], "number").accuracy == 0.75
    assert majority(["b", "a"], "exact").answer == "a"
    with pytest.raises(ValueError, match="at least one"):
        majority([], "exact")


def test_the_best_constant_box_covers_the_cluster() -> None:
    cluster = [BOX.format(100 + d, 100, 300 + d, 300) for d in (0, 20, 40)]
    best = majority([*cluster, BOX.format(700, 700, 900, 900)], "box")
    assert best.accuracy == 0.75


def test_a_skill_with_two_checks() -> None:
    pairs = [("12", "number"), ("12", "number"), ("red", "exact"), ("7", "number")]
    best = majority_per_skill({"chart": pairs})["chart"]
    assert (best.answer, best.accuracy) == ("12", 0.5)
