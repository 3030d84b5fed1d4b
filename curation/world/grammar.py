"""What a caption claims, read from its text alone.

Captions of the small world follow a small grammar; spoilt ones follow it in part. Whatever does
not parse is counted, never guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from curation.world.motion import DIRECTION_NAMES
from curation.world.photos import NOUNS
from curation.world.plots import KIND_NAMES
from curation.world.scene import CELLS, COLOUR_NAMES, SHAPES

_COLOUR = "|".join(COLOUR_NAMES)
_CELL = "|".join(sorted(CELLS, key=len, reverse=True))
_THING = re.compile(
    rf"an? (?:(?P<colour>{_COLOUR}) )?(?P<shape>{'|'.join(SHAPES)}|object)"
    rf"(?: (?P<still>stands))?(?: (?:at|in) the (?P<cell>{_CELL}))?"
)
_MOVER = re.compile(
    rf"an? (?P<colour>{_COLOUR}) (?P<shape>{'|'.join(SHAPES)}) "
    rf"moves (?P<direction>{'|'.join(DIRECTION_NAMES)})"
)
_COUNT = re.compile(r"(\d+) objects?: ")
_WORD = re.compile(rf'the word "([a-z]+)"(?: in ({_COLOUR}))?')
_DIGIT = re.compile(r"a handwritten (\d)(?: on the (left|right))?")
_CHART = re.compile(rf"an? ({'|'.join(KIND_NAMES.values())}) with (.+)")
_MARK = re.compile(rf"an? ({_COLOUR}) (?:bar|point|slice|box)(?: at (\d+))?")
_CELLS = re.compile(r"(\d) cells")
_EXTREME = re.compile(rf"the ({_COLOUR}|{_CELL}) (?:slice|cell) is the (largest|darkest)")
_PHOTO = re.compile(rf"(?:a photo of|this photo shows) (?:an? |the )?({'|'.join(NOUNS)})")


@dataclass(frozen=True, slots=True)
class ClaimedThing:
    """An object that a caption names; what it does not say is None."""

    colour: str | None
    shape: str | None
    cell: int | None

    @property
    def num_details(self) -> int:
        return sum(value is not None for value in (self.colour, self.shape, self.cell))


@dataclass(slots=True)
class Claims:
    """All that a caption says. `kind` is that of the truth it speaks of, "" if it says nothing."""

    kind: str = ""
    things: list[ClaimedThing] = field(default_factory=list)
    count: int | None = None
    facts: set[tuple[str, ...]] = field(default_factory=set)
    num_unparsed: int = 0


def _thing(match: re.Match[str]) -> ClaimedThing:
    cell, shape = match["cell"], match["shape"]
    return ClaimedThing(
        match["colour"],
        None if shape == "object" else shape,
        None if cell is None else CELLS.index(cell),
    )


def parse_caption(text: str) -> Claims:
    """Read the claims of a caption. Never raises; unknown pieces are counted in `num_unparsed`."""
    text = text.strip().rstrip(".")
    if match := _WORD.fullmatch(text):
        claims = Claims("word", facts={("word", match[1])})
        if match[2]:
            claims.facts.add(("ink", match[2]))
        return claims
    if match := _PHOTO.fullmatch(text):
        return Claims("photo", facts={("noun", match[1])})
    if match := _CHART.fullmatch(text):
        return _parse_chart(match[1], match[2])
    claims = Claims()
    if match := _COUNT.match(text):
        claims.count, claims.kind = int(match[1]), "scene"
        text = text[match.end() :]
    for piece in text.split(", "):
        _parse_piece(piece, claims)
    return claims


def _parse_piece(piece: str, claims: Claims) -> None:
    if match := _DIGIT.fullmatch(piece):
        claims.kind = "digits"
        claims.facts.add(("digit", match[2] or "", match[1]))
    elif match := _MOVER.fullmatch(piece):
        claims.kind = "motion"
        claims.facts |= {
            ("mover", match["colour"], match["shape"]),
            ("direction", match["direction"]),
        }
    elif match := _THING.fullmatch(piece):
        claims.kind = claims.kind or "scene"
        claims.things.append(_thing(match))
    else:
        claims.num_unparsed += 1


def _parse_chart(kind: str, rest: str) -> Claims:
    claims = Claims("chart", facts={("chart", kind)})
    for piece in rest.split(", "):
        if match := _MARK.fullmatch(piece):
            claims.facts.add(("mark", *(group for group in match.groups() if group)))
        elif match := _CELLS.fullmatch(piece):
            claims.facts.add(("cells", match[1]))
        elif match := _EXTREME.fullmatch(piece):
            claims.facts.add((match[2], match[1]))
        else:
            claims.num_unparsed += 1
    return claims
