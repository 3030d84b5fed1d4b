"""What one scores without looking: the best constant answer per skill.

An accuracy means little without it: "yes" alone gets half of the existence questions right.
The constant is chosen on the very items that are scored, so the baseline errs upwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from evaluation.answers import is_correct, normalise, parse_box


@dataclass(frozen=True, slots=True)
class Baseline:
    """The best constant answer of a skill and the accuracy it reaches (0-1)."""

    answer: str
    accuracy: float


def majority(answers: Sequence[str], check: str) -> Baseline:
    """The constant that is right most often; ties go to the one that sorts first.

    For boxes the candidates are every true box and the mean box, since no two boxes are equal.

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("a baseline needs at least one answer")
    if check == "box":
        candidates = sorted({*answers, _mean_box(answers)})
    else:
        counts = Counter(normalise(answer) for answer in answers)
        top = max(counts.values())
        candidates = [min(answer for answer, count in counts.items() if count == top)]
    scored = [
        Baseline(guess, mean(float(is_correct(guess, answer, check)) for answer in answers))
        for guess in candidates
    ]
    return max(scored, key=lambda baseline: baseline.accuracy)


def majority_per_skill(
    items: Mapping[str, Sequence[tuple[str, str]]],
) -> dict[str, Baseline]:
    """Baselines of every skill from its (answer, check) pairs.

    A skill may mix checks (a chart asks for a number or a colour); the constant is then the best
    over all of them, scored by each item's own rule.
    """
    result: dict[str, Baseline] = {}
    for skill, pairs in items.items():
        checks = sorted({check for _, check in pairs})
        options = []
        for check in checks:
            guess = majority([answer for answer, c in pairs if c == check], check).answer
            right = [is_correct(guess, answer, c) for answer, c in pairs]
            options.append(Baseline(guess, mean(map(float, right))))
        result[skill] = max(options, key=lambda baseline: baseline.accuracy)
    return result


def _mean_box(answers: Sequence[str]) -> str:
    boxes = [box for box in map(parse_box, answers) if box]
    if not boxes:
        return answers[0]
    x1, y1, x2, y2 = (round(mean(corner)) for corner in zip(*boxes, strict=True))
    return f"<box>({x1},{y1}),({x2},{y2})</box>"
