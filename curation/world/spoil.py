"""Bad captions on purpose: what a crawl would bring, with the corruption's name beside it.

Strong corruptions score 1-2 on alignment, mild ones at least 3, and each kind keeps well clear of
the limit between them: captions on the edge would teach a judge noise.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from curation.oracle import score_caption
from curation.world.items import Item, caption_of, sample_subject
from curation.world.questions import listing
from curation.world.scene import COLOUR_NAMES, SHAPES, Scene, Thing, pick, pick_weighted

VAGUE = (
    "an image with some things",
    "a picture",
    "some shapes",
    "there is something here",
    "an image of various objects",
    "a nice picture with colours",
)
# Shares among the strong corruptions, our choice: half spoil the truth, half the content.
STRONG = {
    "swapped": 0.2,
    "wrong": 0.2,
    "hallucinated": 0.12,
    "vague": 0.15,
    "truncated": 0.11,
    "repeated": 0.11,
    "terse": 0.11,
}
MILD = ("one_wrong", "one_missing", "placeless")
# Of all captions, how many carry a mild fault; our choice.
MILD_RATE = 0.1
STRONG_BELOW = 3
MILD_AT_LEAST = 3
_TRIES = 20


def _swapped(item: Item, caption: str, rng: np.random.Generator) -> str:
    """The caption of another image of the same source; one time in four of any source."""
    sources = ("microworld", "digits", "words", "photos")
    source = item.source if rng.random() < 0.75 else pick(rng, sources)
    return caption_of(sample_subject(source, rng), rng)


def _other_thing(thing: Thing, rng: np.random.Generator, num_wrong: int) -> Thing:
    """The thing with `num_wrong` of colour, shape and cell changed."""
    colour, shape, cell = thing.colour, thing.shape, thing.cell
    for attribute in [int(i) for i in rng.permutation(3)[:num_wrong]]:
        if attribute == 0:
            colour = pick(rng, [c for c in COLOUR_NAMES if c != colour])
        elif attribute == 1:
            shape = pick(rng, [s for s in SHAPES if s != shape])
        else:
            cell = pick(rng, [c for c in range(9) if c != cell])
    return Thing(cell, shape, colour, thing.x, thing.y, thing.size)


def _in_order(things: list[Thing]) -> str:
    return listing(sorted(things, key=lambda t: t.cell))


def _wrong(item: Item, caption: str, rng: np.random.Generator) -> str:
    """Most attributes wrong; for other subjects than scenes, the caption of another one."""
    if not isinstance(item.subject, Scene):
        return caption_of(sample_subject(item.source, rng), rng)
    return _in_order([_other_thing(t, rng, 2 + (rng.random() < 0.5)) for t in item.subject.things])


def _hallucinated(item: Item, caption: str, rng: np.random.Generator) -> str:
    """Objects that are not there, more than those that are."""
    if not isinstance(item.subject, Scene):
        return f"{caption}, {caption_of(sample_subject('microworld', rng), rng)}"
    kept = list(item.subject.things[: len(item.subject.things) // 2])
    invented = [_other_thing(pick(rng, item.subject.things), rng, 3) for _ in range(2 + len(kept))]
    return _in_order(kept + invented)


def _vague(item: Item, caption: str, rng: np.random.Generator) -> str:
    return pick(rng, VAGUE)


def _truncated(item: Item, caption: str, rng: np.random.Generator) -> str:
    """Cut off early, in the middle of a word where it falls so."""
    return caption[: 3 + int(rng.random() * max(1, min(24, len(caption) // 3)))].rstrip()


def _repeated(item: Item, caption: str, rng: np.random.Generator) -> str:
    """A decoder stuck in a loop: one or two words again and again."""
    words = caption.split(" ")
    start = int(rng.random() * max(1, len(words) - 2))
    stuck = words[start : start + 1 + int(rng.random() * 2)]
    return " ".join(stuck * (3 + int(rng.random() * 4)))


def _terse(item: Item, caption: str, rng: np.random.Generator) -> str:
    """One object of several, without its place."""
    if not isinstance(item.subject, Scene) or len(item.subject.things) < 2:
        return caption
    return f"a {pick(rng, item.subject.things).name}"


def _one_wrong(item: Item, caption: str, rng: np.random.Generator) -> str:
    if not isinstance(item.subject, Scene) or len(item.subject.things) < 2:
        return caption
    things = list(item.subject.things)
    index = int(rng.random() * len(things))
    things[index] = _other_thing(things[index], rng, 1)
    return _in_order(things)


def _one_missing(item: Item, caption: str, rng: np.random.Generator) -> str:
    if not isinstance(item.subject, Scene) or len(item.subject.things) < 3:
        return caption
    things = list(item.subject.things)
    del things[int(rng.random() * len(things))]
    return _in_order(things)


def _placeless(item: Item, caption: str, rng: np.random.Generator) -> str:
    """Every object, none of the places."""
    if not isinstance(item.subject, Scene) or len(item.subject.things) < 2:
        return caption
    return ", ".join(f"a {t.name}" for t in item.subject.things)


_SPOILERS: dict[str, Callable[[Item, str, np.random.Generator], str]] = {
    "swapped": _swapped,
    "wrong": _wrong,
    "hallucinated": _hallucinated,
    "vague": _vague,
    "truncated": _truncated,
    "repeated": _repeated,
    "terse": _terse,
    "one_wrong": _one_wrong,
    "one_missing": _one_missing,
    "placeless": _placeless,
}


def spoil(item: Item, caption: str, rng: np.random.Generator, *, mild: bool) -> tuple[str, str]:
    """A corrupted caption and the corruption's name; ("...", "clean") where none applies."""
    for _ in range(_TRIES):
        quality = pick(rng, MILD) if mild else pick_weighted(rng, STRONG)
        spoilt = _SPOILERS[quality](item, caption, rng)
        ita = score_caption(item.truth, spoilt).ita
        if spoilt != caption and (ita >= MILD_AT_LEAST if mild else ita < STRONG_BELOW):
            return spoilt, quality
    if mild:
        return caption, "clean"
    return pick(rng, VAGUE), "vague"


def maybe_spoil(
    item: Item, caption: str, rng: np.random.Generator, bad_rate: float
) -> tuple[str, str]:
    """Spoil `bad_rate` of the captions strongly and `MILD_RATE` of them mildly."""
    mark = rng.random()
    if mark < bad_rate:
        return spoil(item, caption, rng, mild=False)
    if mark < bad_rate + MILD_RATE:
        return spoil(item, caption, rng, mild=True)
    return caption, "clean"
