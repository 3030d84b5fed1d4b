"""The teacher of the small world: exact scores of captions and clips from known truth.

Caption rubric (paper section 3.1.1 names the two dimensions and their aspects; the scales'
thresholds are our choice).

ITA, image-text alignment, from an F score of what the caption claims against what is true:
- precision (accuracy): the mean credit of the claims. An object earns the share of its stated
  colour, shape and place that is right, and nothing when fewer than two are: one match in three
  is chance. A claim that matches nothing is a hallucination and earns nothing.
- recall (completeness, specificity): the credit earned, over all that the image shows.
- 5: F >= 0.95, 4: >= 0.75, 3: >= 0.58, 2: >= 0.25, otherwise 1.

VIR, visual information richness, from the number of distinct visual details in the words,
true or not (ITA judges truth): a colour, a shape, a place, a mark or an ink is one detail, a
word, a digit, a noun or a value two, a named kind of picture one.
- 5: >= 9 details, 4: >= 5, 3: >= 3, 2: 2, otherwise 1.

Clips are scored on the paper's three metrics (section 4.1.1), see `score_video`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from curation.world.grammar import ClaimedThing, Claims, parse_caption
from curation.world.plots import KIND_NAMES
from sailyard.samples import Sample

ITA_THRESHOLDS = ((0.95, 5), (0.75, 4), (0.58, 3), (0.25, 2))
VIR_THRESHOLDS = ((9, 5), (5, 4), (3, 3), (2, 2))
REFUSED = -1
"""The score of a clip that a teacher would refuse to judge."""


@dataclass(frozen=True, slots=True)
class CaptionScore:
    """`ita` and `vir`, integers 1-5, higher is better. `f` is the F score behind ITA."""

    ita: int
    vir: int
    f: float


@dataclass(frozen=True, slots=True)
class VideoScore:
    """Integers; -1 means refused. Alignment to 10, richness to 7, difficulty to 8."""

    alignment: int
    richness: int
    difficulty: int


def _level(value: float, thresholds: tuple[tuple[float, int], ...]) -> int:
    return next((score for least, score in thresholds if value >= least), 1)


# --- captions -------------------------------------------------------------------------------------


def true_claims(truth: Mapping[str, Any]) -> Claims:
    """The claims of a complete and true caption, from `Sample.meta["scene"]`."""
    kind = truth["kind"]
    if kind in ("scene", "motion"):
        shown = truth["things"] if kind == "scene" else truth["still"]
        things = [ClaimedThing(t["colour"], t["shape"], t["cell"]) for t in shown]
        if kind == "scene":
            return Claims(kind, things)
        mover = truth["mover"]
        facts: set[tuple[str, ...]] = {
            ("mover", mover["colour"], mover["shape"]),
            ("direction", truth["direction"]),
        }
        return Claims(kind, things, facts=facts)
    if kind == "word":
        return Claims(kind, facts={("word", truth["word"]), ("ink", truth["colour"])})
    if kind == "digits":
        digits = truth["digits"]
        sides = ("",) if len(digits) == 1 else ("left", "right")
        facts = {("digit", s, str(d)) for s, d in zip(sides, digits, strict=True)}
        return Claims(kind, facts=facts)
    if kind == "photo":
        return Claims(kind, facts={("noun", truth["noun"])})
    if kind == "chart":
        return Claims(kind, facts=_chart_facts(truth))
    raise ValueError(f"no rubric for a truth of kind {kind!r}")


def _chart_facts(truth: Mapping[str, Any]) -> set[tuple[str, ...]]:
    marks, values = truth["colours"], truth["values"]
    chart = ("chart", KIND_NAMES[truth["chart"]])
    top = marks[values.index(max(values))]
    if truth["chart"] == "pie":
        return {chart, ("largest", top), *(("mark", mark) for mark in marks)}
    if truth["chart"] == "heatmap":
        return {chart, ("darkest", top), ("cells", str(len(marks)))}
    return {chart, *(("mark", m, str(v)) for m, v in zip(marks, values, strict=True))}


def _credit(claim: ClaimedThing, true: ClaimedThing) -> float:
    pairs = ((claim.colour, true.colour), (claim.shape, true.shape), (claim.cell, true.cell))
    right = sum(stated == fact for stated, fact in pairs)
    return right / 3 if right >= 2 else 0.0


def _matched(claimed: list[ClaimedThing], true: list[ClaimedThing]) -> float:
    """Total credit of a greedy one-to-one matching, best pairs first."""
    pairs = sorted(
        ((_credit(c, t), i, j) for i, c in enumerate(claimed) for j, t in enumerate(true)),
        key=lambda pair: (-pair[0], pair[1], pair[2]),
    )
    used_claims: set[int] = set()
    used_true: set[int] = set()
    total = 0.0
    for credit, i, j in pairs:
        if credit > 0 and i not in used_claims and j not in used_true:
            used_claims.add(i)
            used_true.add(j)
            total += credit
    return total


def f_score(claims: Claims, truth: Claims) -> float:
    """Harmonic mean of accuracy and completeness, 0 to 1. Unparsed pieces are false claims."""
    if claims.kind != truth.kind:
        return 0.0
    earned = _matched(claims.things, truth.things) + len(claims.facts & truth.facts)
    num_claimed = len(claims.things) + len(claims.facts) + claims.num_unparsed
    # A stated count is one more claim when wrong; being right it adds nothing to what is listed.
    num_claimed += claims.count is not None and claims.count != len(truth.things)
    num_true = len(truth.things) + len(truth.facts)
    return 2 * earned / (num_claimed + num_true) if earned else 0.0


def num_details(claims: Claims) -> int:
    """Distinct visual details that the words give, true or not."""
    things = sum(thing.num_details for thing in set(claims.things))
    facts = sum(_fact_details(fact) for fact in claims.facts)
    return things + facts + (claims.kind in ("word", "digits", "chart", "photo"))


def _fact_details(fact: tuple[str, ...]) -> int:
    name = fact[0]
    if name == "digit":
        return 3 if fact[1] else 2
    if name == "mark":
        return 1 if len(fact) == 2 else 3
    return {"word": 2, "ink": 1, "noun": 2, "mover": 2, "direction": 2, "chart": 0}.get(name, 1)


def score_caption(truth: Mapping[str, Any], caption: str) -> CaptionScore:
    """Score a caption against `Sample.meta["scene"]` by the rubric above."""
    claims = parse_caption(caption)
    f = f_score(claims, true_claims(truth))
    return CaptionScore(_level(f, ITA_THRESHOLDS), _level(num_details(claims), VIR_THRESHOLDS), f)


def score_sample(sample: Sample) -> CaptionScore | None:
    """Score a caption sample; None where the truth is not known (user data)."""
    truth = sample.meta.get("scene")
    if truth is None:
        return None
    return score_caption(truth, sample.messages[-1]["content"])


# --- clips ----------------------------------------------------------------------------------------

# Least travel, as a share of the image side, that a viewer notices.
VISIBLE_TRAVEL = 0.15
# How much of the clip each kind of question needs: one frame, two frames, all of them.
DIFFICULTY = {
    "colour.mover": 2,
    "motion.check": 4,
    "motion.direction": 4,
    "motion.who": 5,
}


def score_video(sample: Sample) -> VideoScore | None:
    """Score one clip with one question; None where the truth is not known.

    Alignment (do the frames support the answer): 10 for a right answer about visible motion, 8
    for one that needs no motion, 2 when nothing moves, 1 for a wrong answer. Richness: 3, plus
    one each for a third frame, a fifth frame, visible travel, and every standing object, at
    most 7. Difficulty: by kind of question, plus one when other objects distract. Blank frames
    are refused (-1).
    """
    truth = sample.meta.get("scene")
    if truth is None or truth.get("kind") != "motion":
        return None
    if truth.get("blank"):
        return VideoScore(REFUSED, REFUSED, REFUSED)
    kind = sample.meta["kind"]
    moves = truth["travel"] >= VISIBLE_TRAVEL
    if sample.messages[-1]["content"] != sample.meta["answer"]:
        alignment = 1
    elif kind == "colour.mover":
        alignment = 8
    else:
        alignment = 10 if moves else 2
    num_frames, num_still = truth["num_frames"], len(truth["still"])
    richness = 3 + (num_frames >= 3) + (num_frames >= 5) + moves + num_still
    return VideoScore(alignment, min(7, richness), DIFFICULTY[kind] + (num_still > 0))
