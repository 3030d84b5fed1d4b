"""Images written as text: nine words between brackets, each naming a thing and its place.

    [ topleftredcircle centerbluesquare blank blank blank blank blank blank blank ]

The tiny language model learns from such lines what it will later do with pictures: an 84-pixel
image becomes nine visual tokens between <img> and </img>, so a line is as long as a picture. What
is left for alignment is the meaning of alignment: visual tokens that say what these words say.
Place and thing share a word because a patch's vector holds both, too. Our choice; the paper
starts from Qwen3.
"""

from __future__ import annotations

from curation.world.digits import DigitImage
from curation.world.motion import DIRECTIONS, Motion
from curation.world.photos import PhotoCrop
from curation.world.plots import Chart
from curation.world.scene import CELLS, Scene
from curation.world.words import WordImage

BLANK = "blank"
NUM_WORDS = 9
NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def words_of(subject: Scene | DigitImage | WordImage | Chart | PhotoCrop) -> list[str]:
    """The nine words of a picture."""
    if isinstance(subject, Scene):
        words = [_placed(t.cell, t.colour + t.shape) for t in subject.things]
    elif isinstance(subject, DigitImage):
        named = [NUMERALS[digit] for digit in subject.digits]
        words = named if len(named) == 1 else ["left" + named[0], "right" + named[1]]
    elif isinstance(subject, WordImage):
        words = [subject.word, "ink" + subject.colour]
    elif isinstance(subject, PhotoCrop):
        words = ["photo" + _joined(subject.noun)]
    else:
        pairs = zip(subject.marks, subject.values, strict=True)
        words = [subject.kind + "chart", *(_joined(m) + NUMERALS[v] for m, v in pairs)]
    return _padded(words)


def frames_of(motion: Motion) -> list[list[str]]:
    """The nine words of every frame of a clip."""
    dx, dy = DIRECTIONS[motion.direction]
    still = [_placed(t.cell, t.colour + t.shape) for t in motion.still]
    frames = []
    for i in range(motion.num_frames):
        step = motion.travel * i / (motion.num_frames - 1)
        column = min(2, int((motion.mover.x + dx * step) * 3))
        row = min(2, int((motion.mover.y + dy * step) * 3))
        moved = _placed(3 * row + column, motion.mover.colour + motion.mover.shape)
        frames.append(_padded([moved, *still]))
    return frames


def shorthand(subject: Scene | DigitImage | WordImage | Chart | PhotoCrop | Motion) -> str:
    """What stands in a user turn where a picture's or clip's placeholders would stand."""
    if isinstance(subject, Motion):
        lines = enumerate(frames_of(subject), start=1)
        return "".join(f"Frame-{i}: [ {' '.join(words)} ]\n" for i, words in lines)
    return f"[ {' '.join(words_of(subject))} ]\n"


def _placed(cell: int, name: str) -> str:
    return _joined(CELLS[cell]) + name


def _padded(words: list[str]) -> list[str]:
    return (words + [BLANK] * NUM_WORDS)[:NUM_WORDS]


def _joined(name: str) -> str:
    return name.replace(" ", "")
