"""Judges: labels, the even draw, the figures, and the stages from scores to filtered captions."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from curation import caption2, scores
from curation.judging import JUDGES_FILE, Judges, JudgesError, Verdict
from sailyard.samples import SampleReader, read_samples
from sailyard.stage import local_context
from tests.evaluation.tiny import captions, micro_recipe, save_tiny, write
from training import judges


def test_reasons_to_drop() -> None:
    good = Verdict(ita=3, vir=5, ita_yes=True, vir_yes=True)
    assert good.reasons(3) == []
    bad = Verdict(ita=2, vir=4, ita_yes=True, vir_yes=False)
    assert bad.reasons(3) == ["ita_score", "vir_no"]


def test_labels_follow_the_teacher() -> None:
    scored = {"ita": 2, "vir": 3}
    answers = {name: judges.right_answer(name, scored) for name in judges.JUDGES}
    assert answers == {"ita_score": "2", "ita_yorn": "no", "vir_score": "3", "vir_yorn": "yes"}


def test_scores_are_drawn_evenly() -> None:
    scored = dict.fromkeys(range(100), 5) | {100: 1, 101: 1, 102: 3}
    drawn = judges.draw_evenly(scored, 300, np.random.default_rng(0))
    assert Counter(scored[p] for p in drawn) == {5: 100, 1: 100, 3: 100}


def test_an_always_yes_judge_gets_the_base_rate() -> None:
    given = [1, 2, 3, 4, 5, 5, 5, 5]
    truths = ["no" if score < 3 else "yes" for score in given]
    quality = judges.measure(["yes"] * 8, truths, given)
    assert (quality.precision, quality.recall) == (pytest.approx(0.6), 1.0)
    assert quality.drop_recall == 0.0
    perfect = judges.measure([str(s) for s in given], [str(s) for s in given], given)
    assert (perfect.precision, perfect.drop_precision) == (1.0, 1.0)
    assert perfect.exact == pytest.approx(1.0)


def test_a_missing_judges_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(JudgesError, match=JUDGES_FILE):
        Judges.load(tmp_path)


@pytest.mark.slow
def test_from_teacher_scores_to_filtered_captions(tmp_path: Path) -> None:
    """The three stages on real (random, tiny) weights: nothing is lost on the way."""
    torch.set_num_threads(1)
    recipe = micro_recipe(
        "curation.judges.threads=1", "curation.judges.num_train=20", "curation.judges.max_steps=2"
    )
    raw = write(tmp_path / "captions", captions(40))

    ctx = local_context(tmp_path / "a", recipe, "curation.caption_scores", {"captions": raw})
    scores.run(ctx)
    scored = ctx.output("scores")
    assert ctx.summary_values["scored"] == 40
    assert {1, 5} >= {min(s.meta["ita"], 5) for s in read_samples(scored)} & {1, 5}

    captioner = save_tiny(tmp_path / "captioner")
    inputs = {"scores": scored, "captioner": captioner}
    ctx = local_context(tmp_path / "b", recipe, "curation.judges", inputs)
    judges.run(ctx)
    artifact = ctx.output("judges")
    described = json.loads((artifact / JUDGES_FILE).read_text())
    assert set(described["quality"]) == set(described["judges"]) == set(judges.JUDGES)

    inputs = {"captions": raw, "judges": artifact}
    ctx = local_context(tmp_path / "c", recipe, "curation.caption2", inputs)
    caption2.run(ctx)
    kept, dropped = SampleReader(ctx.output("captions")), SampleReader(ctx.output("dropped"))
    assert len(kept) + len(dropped) == 40
    ids = [sample.id for reader in (kept, dropped) for sample in reader]
    assert sorted(ids) == sorted(sample.id for sample in read_samples(raw))
    assert all(sample.meta["dropped_because"] for sample in dropped)
    assert all("quality" in sample.meta and "judged" in sample.meta for sample in kept)
    assert ctx.summary_values["dropped"] == len(dropped)


@pytest.mark.slow
def test_weak_judges_stop_the_pipeline(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    recipe = micro_recipe(
        "curation.judges.threads=1",
        "curation.judges.num_train=10",
        "curation.judges.max_steps=1",
        "curation.judges.min_precision=1.0",
        "curation.judges.min_recall=1.0",
    )
    scored = write(tmp_path / "scored", captions(30))
    ctx = local_context(tmp_path / "a", recipe, "curation.caption_scores", {"captions": scored})
    scores.run(ctx)
    inputs = {"scores": ctx.output("scores"), "captioner": save_tiny(tmp_path / "captioner")}
    ctx = local_context(tmp_path / "b", recipe, "curation.judges", inputs)
    with pytest.raises(judges.JudgesTooWeak, match=r"precision 1\.0.*max_steps"):
        judges.run(ctx)
