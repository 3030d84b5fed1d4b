"""The exact teacher: rubric of captions and clips, and how spoilt captions score."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from curation.oracle import REFUSED, score_caption, score_sample, score_video
from curation.world.items import Item, caption_of, sample_subject
from curation.world.scene import pick
from curation.world.sources import raw_clips
from curation.world.spoil import MILD, STRONG, VAGUE, maybe_spoil
from sailyard.samples import Sample

TRUTH: dict[str, Any] = {
    "kind": "scene",
    "things": [
        {"cell": 0, "shape": "circle", "colour": "red"},
        {"cell": 4, "shape": "square", "colour": "blue"},
        {"cell": 8, "shape": "cross", "colour": "black"},
    ],
}
FULL = (
    "a red circle at the top left, a blue square in the center, a black cross at the bottom right"
)


@pytest.mark.parametrize(
    ("caption", "ita", "vir"),
    [
        (FULL, 5, 5),
        (f"3 objects: {FULL}", 5, 5),
        (FULL.replace("blue", "green"), 4, 5),  # one attribute of nine
        ("a red circle at the top left, a blue square in the center", 4, 4),  # one object missing
        ("a red circle, a blue square, a black cross", 3, 4),  # no places
        (f"4 objects: {FULL}", 4, 5),  # a wrong count
        (f"{FULL}, a green circle at the top right, a green cross at the middle left, "
         "a purple square at the top center", 3, 5),  # half of it invented
        ("a red circle", 2, 2),
        ("a green cross at the top right, a yellow circle at the bottom left", 1, 4),
        ("a red circle at the top left, a red circle at the top left", 2, 3),  # said twice
        ("an image with some things", 1, 1),
        ("a a a a a a", 1, 1),
        ("", 1, 1),
        ("the word \"sail\" in red", 1, 3),
    ],
)  # fmt: skip
def test_caption_rubric(caption: str, ita: int, vir: int) -> None:
    score = score_caption(TRUTH, caption)
    assert (score.ita, score.vir) == (ita, vir), score


def test_unknown_truth_is_not_scored() -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    sample = Sample("u", "user:x", "caption", messages)
    assert score_sample(sample) is None
    assert score_video(sample) is None
    with pytest.raises(ValueError, match="smell"):
        score_caption({"kind": "smell"}, "a rose")


def _spoilt(num: int) -> list[tuple[str, str, int, int]]:
    rng = np.random.default_rng(1)
    out = []
    for _ in range(num):
        source = pick(rng, ("microworld",) * 6 + ("digits", "words", "photos"))
        subject = sample_subject(source, rng)
        item = Item(source, subject, (), subject.meta())
        caption, quality = maybe_spoil(item, caption_of(subject, rng), rng, 0.18)
        score = score_caption(item.truth, caption)
        out.append((caption, quality, score.ita, score.vir))
    return out


def test_about_a_fifth_scores_below_three_and_the_limit_is_clear() -> None:
    spoilt = _spoilt(1500)
    qualities = Counter(quality for _, quality, _, _ in spoilt)
    assert set(STRONG) | set(MILD) | {"clean"} == set(qualities)
    below = np.mean([ita < 3 for _, _, ita, _ in spoilt])
    assert 0.14 < below < 0.22
    for caption, quality, ita, _ in spoilt:
        assert (ita < 3) == (quality in STRONG), (caption, quality)
        assert quality != "clean" or ita == 5
    assert {vir for *_, vir in spoilt} == {1, 2, 3, 4, 5}
    assert 0.05 < np.mean([vir < 3 for *_, vir in spoilt]) < 0.18


def test_vague_captions_say_nothing() -> None:
    assert all(score_caption(TRUTH, caption).vir == 1 for caption in VAGUE)


def test_clip_scores_find_the_planted_faults() -> None:
    clips = list(raw_clips(250, np.random.default_rng(2), 84))
    by_fault: dict[str, list[Any]] = {}
    for clip in clips:
        score = score_video(clip)
        assert score is not None
        by_fault.setdefault(clip.meta["fault"], []).append(score)
        assert -1 <= score.alignment <= 10
        assert -1 <= score.richness <= 7
        assert -1 <= score.difficulty <= 8
    assert set(by_fault) == {"none", "wrong_answer", "static", "blank"}
    assert all(s.alignment == REFUSED for s in by_fault["blank"])
    assert all(s.alignment < 5 for s in by_fault["wrong_answer"])
    assert all(s.alignment >= 5 for s in by_fault["none"])
