"""Answers to the small world's questions, worked out from a question's words and the truth.

Written apart from the generators in `questions`: it reads the English of a question and looks the
answer up, so it can check generated questions, questions made from captions, and the answers of
sources of unknown quality.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from curation.world.plots import KIND_NAMES
from curation.world.scene import CELLS, COLOUR_NAMES, SHAPES

Truth = Mapping[str, Any]
Thing = Mapping[str, Any]

_C = "(" + "|".join(COLOUR_NAMES) + ")"
_S = "(" + "|".join(SHAPES) + ")"
_P = "(?:at|in) the (" + "|".join(sorted(CELLS, key=len, reverse=True)) + ")"
_REL = "(to the left of|to the right of|above|below)"


def agrees(answer: str, truth: str | None) -> bool:
    """Whether an answer is the true one; a list may come in any order."""
    return truth is not None and sorted(answer.split(", ")) == sorted(truth.split(", "))


def answer_question(question: str, truth: Truth) -> str | None:
    """The answer by the truth of `Sample.meta["scene"]`; None where the words or truth allow none.

    Hints on further lines ("Answer the question using ...") are ignored.
    """
    line = question.replace("<image>\n", "").strip().split("\n")[0]
    line = re.sub(r"^(?:Frame-\d+: )+", "", line)
    for pattern, answer in _RULES.get(truth["kind"], ()):
        if match := pattern.fullmatch(line):
            return answer(truth, match.groups())
    return None


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _the(found: Sequence[Thing]) -> Thing | None:
    return found[0] if len(found) == 1 else None


def _named(truth: Truth, colour: str, shape: str) -> Thing | None:
    return _the([t for t in truth["things"] if (t["colour"], t["shape"]) == (colour, shape)])


def _at(truth: Truth, cell: str, attribute: str) -> str | None:
    thing = _the([t for t in truth["things"] if CELLS[t["cell"]] == cell])
    return thing[attribute] if thing else None


def _only(truth: Truth, key: str, value: str, attribute: str) -> str | None:
    thing = _the([t for t in truth["things"] if t[key] == value])
    return thing[attribute] if thing else None


def _count(truth: Truth, key: str, value: str) -> str:
    return str(sum(t[key] == value for t in truth["things"]))


def _related(truth: Truth, groups: Sequence[str]) -> str | None:
    a, b = _named(truth, groups[0], groups[1]), _named(truth, groups[3], groups[4])
    if a is None or b is None:
        return None
    (row_a, column_a), (row_b, column_b) = divmod(a["cell"], 3), divmod(b["cell"], 3)
    holds = {
        "to the left of": column_a < column_b,
        "to the right of": column_a > column_b,
        "above": row_a < row_b,
        "below": row_a > row_b,
    }
    return _yes(holds[groups[2]])


def _box(truth: Truth, groups: Sequence[str]) -> str | None:
    thing = _named(truth, groups[0], groups[1])
    if thing is None or "box" not in thing:
        return None
    x1, y1, x2, y2 = thing["box"]
    return f"<box>({x1},{y1}),({x2},{y2})</box>"


def _where(truth: Truth, groups: Sequence[str]) -> str | None:
    thing = _named(truth, groups[0], groups[1])
    return CELLS[thing["cell"]] if thing else None


def _inventory(truth: Truth, groups: Sequence[str]) -> str:
    return ", ".join(f"{CELLS[t['cell']]}: {t['colour']} {t['shape']}" for t in truth["things"])


def _exists(truth: Truth, groups: Sequence[str]) -> str:
    return _yes(any((t["colour"], t["shape"]) == tuple(groups) for t in truth["things"]))


def _mark_value(truth: Truth, groups: Sequence[str]) -> str | None:
    if truth["chart"] in ("pie", "heatmap") or groups[0] not in truth["colours"]:
        return None
    return str(truth["values"][truth["colours"].index(groups[0])])


def _top_mark(truth: Truth, groups: Sequence[str]) -> str | None:
    top = max(truth["values"])
    return truth["colours"][truth["values"].index(top)] if truth["values"].count(top) == 1 else None


def _digit(side: int) -> Callable[[Truth, Sequence[str]], str | None]:
    return lambda truth, groups: str(truth["digits"][side])


def _sum(truth: Truth, groups: Sequence[str]) -> str | None:
    return str(sum(truth["digits"])) if len(truth["digits"]) == 2 else None


_Rule = tuple[re.Pattern[str], Callable[[Truth, Sequence[str]], str | None]]


def _rule(pattern: str, answer: Callable[[Truth, Sequence[str]], str | None]) -> _Rule:
    return re.compile(pattern), answer


_PHOTO_NAME = r"(?:an? |the )?(\w+)"
_RULES: dict[str, tuple[_Rule, ...]] = {
    "scene": (
        _rule(
            r"How many (?:objects are there|shapes are in the image)\?|Count the objects\."
            r"|What is the number of objects\?",
            lambda t, g: str(len(t["things"])),
        ),
        _rule(rf"How many {_C} objects are there\?", lambda t, g: _count(t, "colour", g[0])),
        _rule(rf"Count the {_C} objects\.", lambda t, g: _count(t, "colour", g[0])),
        _rule(rf"How many {_S}(?:e?s) are there\?", lambda t, g: _count(t, "shape", g[0])),
        _rule(rf"Count the {_S}(?:e?s)\.", lambda t, g: _count(t, "shape", g[0])),
        _rule(rf"(?:Is there|Can you see|Does the image show) a {_C} {_S}\?", _exists),
        _rule(
            rf"(?:What|Which|Name the) colour (?:is|does|of) the object {_P}(?: have)?[.?]",
            lambda t, g: _at(t, g[0], "colour"),
        ),
        _rule(
            rf"(?:What|Which|Name the) shape (?:is|does|of) the object {_P}(?: have)?[.?]",
            lambda t, g: _at(t, g[0], "shape"),
        ),
        _rule(
            rf"(?:What colour is|Name the colour of) the {_S}[.?]",
            lambda t, g: _only(t, "shape", g[0], "colour"),
        ),
        _rule(
            rf"(?:What shape is|Name the shape of) the {_C} object[.?]",
            lambda t, g: _only(t, "colour", g[0], "shape"),
        ),
        _rule(rf"(?:Is|Does) the {_C} {_S} (?:lie )?{_REL} the {_C} {_S}\?", _related),
        _rule(
            rf"(?:Give the box of|Locate|What is the box of) the {_C} {_S}(?: with a box)?[.?]",
            _box,
        ),
        _rule(rf"(?:Where is|In which place is) the {_C} {_S}\?", _where),
        _rule(r"Name things by place\.", _inventory),
    ),
    "word": (
        _rule(
            r"What word is written here\?|Read the word\.|Which word does the image show\?",
            lambda t, g: t["word"],
        ),
        _rule(r"Spell the word\.", lambda t, g: " ".join(t["word"])),
        _rule(r"What is the first letter\?", lambda t, g: t["word"][0]),
        _rule(r"How many letters does the word have\?", lambda t, g: str(len(t["word"]))),
        _rule(r"What colour is the word\?", lambda t, g: t.get("colour")),
        _rule(r'Is the word "(\w+)"\?', lambda t, g: _yes(t["word"] == g[0])),
    ),
    "digits": (
        _rule(
            r"What digit is this\?|Which digit is written here\?|Read the digit\.", _digit(0)
        ),
        _rule(r"(?:What is|Read) the left digit[.?]", _digit(0)),
        _rule(r"(?:What is|Read) the right digit[.?]", _digit(-1)),
        _rule(
            r"Is the (?:left )?digit a (\d)\?", lambda t, g: _yes(str(t["digits"][0]) == g[0])
        ),
        _rule(
            r"What is the sum of the two digits\?|Add the two digits\."
            r"|What do the left and the right digit add up to\?",
            _sum,
        ),
        _rule(r"Which digit is larger\?", lambda t, g: str(max(t["digits"]))),
    ),
    "chart": (
        _rule(
            rf"(?:What is the value of|Which value does|Read the value of) the {_C} "
            r"(?:bar|point|box)(?: have)?[.?]",
            _mark_value,
        ),
        _rule(
            r"Which (?:bar|point|box|slice|cell) (?:has the largest value|is the largest"
            r"|is the darkest)\?|Name the (?:largest slice|darkest cell)\.",
            _top_mark,
        ),
        _rule(
            r"How many (?:bars|points|boxes|slices|cells) are there\?",
            lambda t, g: str(len(t["colours"])),
        ),
        _rule(r"What kind of chart is this\?", lambda t, g: KIND_NAMES[t["chart"]]),
    ),
    "motion": (
        _rule(
            rf"(?:In which direction does|Which way does|Where does) the (?:object|{_C} {_S}) "
            r"(?:move|go|move to)\?",
            lambda t, g: t["direction"],
        ),
        _rule(
            r"Which object moves\?",
            lambda t, g: f"{t['mover']['colour']} {t['mover']['shape']}",
        ),
        _rule(r"Does it move (\w+)\?", lambda t, g: _yes(t["direction"] == g[0])),
        _rule(r"What colour is the moving object\?", lambda t, g: t["mover"]["colour"]),
    ),
    "photo": (
        _rule(
            r"What does the photo show\?|What is this a photo of\?|Name what is in the photo\.",
            lambda t, g: t["noun"],
        ),
        _rule(rf"Does the photo show {_PHOTO_NAME}\?", lambda t, g: _yes(t["noun"] == g[0])),
    ),
}  # fmt: skip
