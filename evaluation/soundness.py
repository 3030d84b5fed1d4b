"""Whether a chain of thought about the small world holds: rules instead of a judge model.

SAIL-RL's thinking reward asks three things of a chain (arXiv 2511.02280, section 3.1); where the
scene's truth is known, rules can decide them:

sound       no step contradicts another: sums and tallies add up, a relation follows from the
            stated places, "there is no ..." agrees with what the chain itself lists
grounded    every object, place and digit that the chain names is in the picture
consistent  the answer follows from the chain, right or wrong

Rules read the plain sentences that the small world's chains are made of. What they do not
understand they do not judge, but a chain in which they find nothing to check is not sound:
otherwise an empty phrase would pass.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evaluation.answers import extract_answer, extract_thinking, normalise, parse_number

CELLS = (
    "top left",
    "top center",
    "top right",
    "middle left",
    "center",
    "middle right",
    "bottom left",
    "bottom center",
    "bottom right",
)
# Longest first, or "center" would match inside "top center".
_PLACE = "|".join(sorted(CELLS, key=len, reverse=True))
_ITEM = re.compile(rf"\b(?:[Aa]n?|[Tt]he) (\w+) (\w+) (?:is )?(?:at|in) the ({_PLACE})\b")
_SEEN = re.compile(r"I see (.*?)\.")
_OF_THESE = re.compile(r"Of these, (.*?) counts?\.|(None of these) counts\.")
_TOTAL = re.compile(r"That is (\d+)")
_EXISTS = re.compile(r"There is (an?|no) (\w+) (\w+)\.")
_ARITHMETIC = re.compile(r"(-?\d+) ([-+*x]) (-?\d+) = (-?\d+)")
_DIGIT = re.compile(r"The (left|right) digit is (\d)")
_SO = re.compile(r"So the (\w+ \w+) is (to the left of|to the right of|above|below) the (\w+ \w+)")
_QUESTION = re.compile(
    r"the (\w+ \w+) (?:lie )?(to the left of|to the right of|above|below) the (\w+ \w+)\?"
)

Item = tuple[str, str, str]  # colour, shape, place


@dataclass(frozen=True, slots=True)
class ChainVerdict:
    """The three verdicts on one chain; `checked` is how many statements a rule could test."""

    sound: bool
    grounded: bool
    consistent: bool
    checked: int

    @property
    def holds(self) -> bool:
        """All three, on at least one statement."""
        return self.sound and self.grounded and self.consistent and self.checked > 0


def check_chain(reply: str, question: str, scene: Mapping[str, Any]) -> ChainVerdict:
    """Judge a reply of the form ``<think>...</think>\\boxed{...}``.

    Args:
        question: the user's words (image placeholders and suffixes may be in it).
        scene: the truth as the small world stores it: ``{"kind": "scene", "things": [...]}``,
            ``{"kind": "digits", "digits": [...]}`` or empty where nothing is known; then
            grounding is not judged and passes.
    """
    chain = extract_thinking(reply)
    steps = [*_arithmetic(chain), *_tallies(chain), *_existence(chain), *_relations(chain)]
    claims = _claims(chain, scene)
    return ChainVerdict(
        sound=bool(steps) and all(steps),
        grounded=all(claims),
        consistent=_follows(chain, question, extract_answer(reply)),
        checked=len(steps) + len(claims),
    )


def _items(text: str) -> list[Item]:
    return [(colour, shape, place) for colour, shape, place in _ITEM.findall(text)]


def _arithmetic(chain: str) -> list[bool]:
    """Every "a + b = c"; where both digits were named, the terms must be those digits."""
    named = dict(_DIGIT.findall(chain))
    steps = []
    for left, sign, right, result in _ARITHMETIC.findall(chain):
        a, b = int(left), int(right)
        value = {"+": a + b, "-": a - b}.get(sign, a * b)
        steps.append(value == int(result))
        if len(named) == 2:
            steps.append((left, right) == (named["left"], named["right"]))
    return steps


def _tallies(chain: str) -> list[bool]:
    """ "I see A, B. Of these, A counts. That is 1": the parts are listed and add up."""
    seen, total = _SEEN.search(chain), _TOTAL.search(chain)
    if not seen or not total:
        return []
    listed = _items(seen[1])
    part = _OF_THESE.search(chain)
    if part is None:
        return [len(listed) == int(total[1])]
    chosen = _items(part[1] or "")
    return [all(item in listed for item in chosen), len(chosen) == int(total[1])]


def _existence(chain: str) -> list[bool]:
    """ "There is a (no) red circle" agrees with the objects that the chain lists."""
    seen = _SEEN.search(chain)
    if not seen:
        return []
    names = {(colour, shape) for colour, shape, _ in _items(seen[1])}
    return [
        ((colour, shape) in names) == (article != "no")
        for article, colour, shape in _EXISTS.findall(chain)
    ]


def _relations(chain: str) -> list[bool]:
    """ "So the A is above the B" follows from the places stated before it."""
    places = {f"{colour} {shape}": place for colour, shape, place in _items(chain)}
    steps = []
    for first, words, second in _SO.findall(chain):
        known = first in places and second in places
        steps.append(known and _related(places[first], words, places[second]))
    return steps


def _related(first: str, words: str, second: str) -> bool:
    row_a, column_a = divmod(CELLS.index(first), 3)
    row_b, column_b = divmod(CELLS.index(second), 3)
    return {
        "to the left of": column_a < column_b,
        "to the right of": column_a > column_b,
        "above": row_a < row_b,
        "below": row_a > row_b,
    }[words]


def _claims(chain: str, scene: Mapping[str, Any]) -> list[bool]:
    """Every object and digit named in the chain, against the truth."""
    if scene.get("kind") == "digits":
        digits = scene["digits"]
        truth = {"left": digits[0], "right": digits[-1]}
        return [truth[side] == int(digit) for side, digit in _DIGIT.findall(chain)]
    if scene.get("kind") != "scene":
        return []
    things = {(t["colour"], t["shape"], CELLS[t["cell"]]) for t in scene["things"]}
    names = {(colour, shape) for colour, shape, _ in things}
    claims = [item in things for item in _items(chain)]
    claims += [
        ((colour, shape) in names) == (article != "no")
        for article, colour, shape in _EXISTS.findall(chain)
    ]
    seen = _SEEN.match(chain)
    if seen:  # a chain that opens with "I see ..." claims to list everything
        claims.append(len(_items(seen[1])) == len(scene["things"]))
    return claims


def _follows(chain: str, question: str, answer: str) -> bool:
    """The answer is the one that the chain's last conclusion gives."""
    if not chain or not answer:
        return False
    verdict = normalise(answer)
    if verdict in ("yes", "no"):
        asked, concluded = _QUESTION.search(question), _SO.search(chain)
        if asked and concluded:
            return (asked.groups() == concluded.groups()) == (verdict == "yes")
        exists = _EXISTS.findall(chain)
        if exists:
            return (exists[-1][0] != "no") == (verdict == "yes")
        return verdict in normalise(chain).split()[-3:]
    number = parse_number(answer)
    if number is not None:
        numbers = re.findall(r"-?\d+", chain)
        return bool(numbers) and float(numbers[-1]) == number
    last = re.split(r"(?<=[.!?])\s+", chain.strip())[-1]
    return verdict in normalise(last)
