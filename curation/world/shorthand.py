"""Images written as text: nine words between brackets, each naming a thing and its place.

    [ topleftredcircle centerbluesquare blank blank blank blank blank blank blank ]

The tiny language model learns from such lines what it will later do with pictures: an 84-pixel
image becomes nine visual tokens between <img> and </img>, so a line is as long as a picture. What
is left for alignment is the meaning of alignment: visual tokens that say what these words say.
Place and thing share a word, and a word is one token, because a patch's vector holds both, too:
`compounds` lists such words with their parts. Our choice; the paper starts from Qwen3.
"""

from __future__ import annotations

from curation.world.digits import DigitImage
from curation.world.motion import DIRECTIONS, Motion
from curation.world.photos import NOUNS, PhotoCrop
from curation.world.plots import COMMON_KINDS, HEATMAP_CELLS, Chart
from curation.world.scene import CELLS, COLOUR_NAMES, SHAPES, Scene, Thing
from curation.world.words import WordImage

BLANK = "blank"
NUM_WORDS = 9

Parts = tuple[str, ...]


def _parts(subject: Scene | DigitImage | WordImage | Chart | PhotoCrop) -> list[Parts]:
    """What the words of a picture say, part by part."""
    if isinstance(subject, Scene):
        return [_placed(t.cell, t) for t in subject.things]
    if isinstance(subject, DigitImage):
        digits = [str(digit) for digit in subject.digits]
        return [(digits[0],)] if len(digits) == 1 else [("left", digits[0]), ("right", digits[1])]
    if isinstance(subject, WordImage):
        return [(subject.word,), ("ink", subject.colour)]
    if isinstance(subject, PhotoCrop):
        return [("photo", subject.noun)]
    pairs = zip(subject.marks, subject.values, strict=True)
    return [(subject.kind, "chart"), *((mark, str(value)) for mark, value in pairs)]


def _frame_parts(motion: Motion) -> list[list[Parts]]:
    """What the words of every frame of a clip say."""
    dx, dy = DIRECTIONS[motion.direction]
    still = [_placed(t.cell, t) for t in motion.still]
    frames = []
    for i in range(motion.num_frames):
        step = motion.travel * i / (motion.num_frames - 1)
        column = min(2, int((motion.mover.x + dx * step) * 3))
        row = min(2, int((motion.mover.y + dy * step) * 3))
        frames.append([_placed(3 * row + column, motion.mover), *still])
    return frames


def shorthand(subject: Scene | DigitImage | WordImage | Chart | PhotoCrop | Motion) -> str:
    """What stands in a user turn where a picture's or clip's placeholders would stand."""
    if isinstance(subject, Motion):
        lines = enumerate(_frame_parts(subject), start=1)
        return "".join(f"Frame-{i}: {_line(parts)}\n" for i, parts in lines)
    return f"{_line(_parts(subject))}\n"


def compounds() -> dict[str, Parts]:
    """Every word that is made of several parts, and those parts."""
    things = [(c, colour, shape) for c in CELLS for colour in COLOUR_NAMES for shape in SHAPES]
    numerals = [str(digit) for digit in range(10)]
    sides = [(side, digit) for side in ("left", "right") for digit in numerals]
    marks = [(m, value) for m in (*COLOUR_NAMES, *HEATMAP_CELLS) for value in numerals]
    kinds = [(kind, "chart") for kind in dict.fromkeys(COMMON_KINDS)]
    inks = [("ink", colour) for colour in COLOUR_NAMES]
    photos = [("photo", noun) for noun in NOUNS]
    return {_word(parts): parts for parts in [*things, *sides, *marks, *kinds, *inks, *photos]}


def _placed(cell: int, thing: Thing) -> Parts:
    return CELLS[cell], thing.colour, thing.shape


def _word(parts: Parts) -> str:
    return "".join(parts).replace(" ", "")


def _line(parts: list[Parts]) -> str:
    words = [*map(_word, parts), *[BLANK] * NUM_WORDS][:NUM_WORDS]
    return f"[ {' '.join(words)} ]"
