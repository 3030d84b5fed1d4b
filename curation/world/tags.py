"""What is true of an image, as a set of short tags: the cheapest dense supervision there is.

A tag is "place:attribute" or a bare attribute. The bootstrap tower learns them before it learns
language, so that captioning starts from features in which every attribute is linearly readable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def tags(truth: Mapping[str, Any]) -> list[str]:
    """Tags of a rendered item, from `meta["scene"]`; none for clips, whose frames differ."""
    kind = truth["kind"]
    if kind == "scene":
        things = truth["things"]
        placed = [f"{t['cell']}:{t[key]}" for t in things for key in ("colour", "shape")]
        return [*placed, f"objects:{len(things)}"]
    if kind == "digits":
        digits = truth["digits"]
        places = ("digit",) if len(digits) == 1 else ("left digit", "right digit")
        return [f"{place}:{digit}" for place, digit in zip(places, digits, strict=True)]
    if kind == "word":
        return [f"word:{truth['word']}", f"ink:{truth['colour']}"]
    if kind == "photo":
        return [f"photo:{truth['noun']}"]
    if kind == "chart":
        marks = list(zip(truth["colours"], truth["values"], strict=True))
        ordered = [f"mark {i}:{value}" for i, (_, value) in enumerate(marks)]
        coloured = [f"mark {i}:{colour}" for i, (colour, _) in enumerate(marks)]
        return [f"chart:{truth['chart']}", f"marks:{len(marks)}", *ordered, *coloured]
    return []
