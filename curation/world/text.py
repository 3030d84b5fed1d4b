"""Pure text that teaches a language model the small world's skills before it can see.

Scenes are described in words and asked about as images are; arithmetic, spelling, charts and
motion come beside them, with and without thinking. Layouts of the held-out side never occur.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from curation.world.captions import (
    PROMPTS,
    VIDEO_PROMPTS,
    caption_digits,
    caption_motion,
    caption_photo,
    caption_scene,
    caption_word,
)
from curation.world.chart_text import caption_chart
from curation.world.digits import sample_digits
from curation.world.items import ask_skill, caption_of, num_turns, questions_of, sample_subject
from curation.world.motion import sample_motion
from curation.world.photos import sample_photo
from curation.world.plots import sample_chart
from curation.world.questions import (
    QA,
    ask_colour,
    ask_digit,
    ask_shape,
    ask_where,
    box_text,
    listing,
)
from curation.world.scene import (
    CELLS,
    COLOUR_NAMES,
    SHAPES,
    Scene,
    pick,
    pick_weighted,
    sample_scene,
)
from curation.world.shorthand import shorthand
from curation.world.tables import load_tables
from curation.world.words import LEXICON, sample_word
from model.chat import THINKING_SUFFIX
from sailyard.samples import Sample

Turn = tuple[str, str]


def _asked(description: str, qas: list[QA]) -> list[Turn]:
    turns = [(qa.question, qa.answer) for qa in qas]
    first = (f"{description}\n{turns[0][0]}", turns[0][1])
    return [first, *turns[1:]]


def _scene_words(scene: Scene, rng: np.random.Generator) -> str:
    """The scene as a caption; one time in two with boxes, so that box questions can be answered."""
    if rng.random() < 0.5:
        return f"Scene: {caption_scene(scene, rng)}."
    boxes = ", ".join(f"{listing([t])} {box_text(t.box())}" for t in scene.things)
    return f"Scene: {boxes}."


def scene_turns(rng: np.random.Generator) -> list[Turn]:
    """A described scene with several questions."""
    scene = sample_scene(rng)
    words = _scene_words(scene, rng)
    qas = questions_of(scene, rng, 2 + int(rng.random() * 4))
    if "<box>" not in words:
        qas = [qa for qa in qas if qa.skill != "box"]
    return _asked(words, qas)


def shorthand_turns(rng: np.random.Generator) -> list[Turn]:
    """A picture or clip written in shorthand, asked about and described as pictures are."""
    source = pick_weighted(rng, SHORTHAND_SHARES)
    subject = sample_subject(source, rng)
    line = shorthand(subject)
    if rng.random() < 0.25:
        prompt = pick(rng, VIDEO_PROMPTS if source == "video" else PROMPTS)
        return [(line + prompt, caption_of(subject, rng))]
    (first, answer), *rest = [
        (qa.question, qa.answer) for qa in questions_of(subject, rng, num_turns(rng))
    ]
    return [(line + first, answer), *rest]


LOOKUPS = {"colour": 0.3, "shape": 0.3, "where": 0.3, "digit": 0.1}


def lookup_turns(rng: np.random.Generator) -> list[Turn]:
    """One colour, shape or place in a full scene in shorthand, or one of two digits.

    The skill that most others build on, both ways: what is there, and where is it.
    """
    kind = pick_weighted(rng, LOOKUPS)
    if kind == "digit":
        digits = sample_digits(rng, 2)
        asked = ask_digit(digits, rng)
        return [(shorthand(digits) + asked.question, asked.answer)]
    while True:
        scene = sample_scene(rng, num_things=3 + int(rng.random() * 2))
        qa = {"colour": ask_colour, "shape": ask_shape, "where": ask_where}[kind](scene, rng)
        if qa is not None:
            return [(shorthand(scene) + qa.question, qa.answer)]


# What takes two lookups or more is thought about; relations and sums, the slowest to learn, most.
CHAINS = {"sum": 0.3, "relation": 0.35, "existence": 0.2, "count": 0.15}


def thinking_turns(rng: np.random.Generator) -> list[Turn]:
    """A scene or two digits in shorthand, with the thinking suffix and a guided chain."""
    subject, qa = ask_skill(pick_weighted(rng, CHAINS), rng)
    return [(f"{shorthand(subject)}{qa.question}\n{THINKING_SUFFIX}", qa.thinking())]


def other_turns(rng: np.random.Generator) -> list[Turn]:
    """Described words, digits, charts, photographs and clips with their questions."""
    kind = int(rng.random() * 5)
    if kind == 0:
        word = sample_word(rng)
        words, qas = caption_word(word), questions_of(word, rng, 6)
    elif kind == 1:
        digits = sample_digits(rng, 1 + int(rng.random() * 2))
        words, qas = caption_digits(digits), questions_of(digits, rng, 5)
    elif kind == 2:
        chart = sample_chart(rng)
        words, qas = caption_chart(chart), questions_of(chart, rng, 7)
    elif kind == 3:
        motion = sample_motion(rng)
        words, qas = caption_motion(motion), questions_of(motion, rng, 4)
    else:
        crop = sample_photo(rng)
        words, qas = caption_photo(crop, rng), questions_of(crop, rng, 2)
    return _asked(f"Scene: {words}.", qas)


def arithmetic_turns(rng: np.random.Generator) -> list[Turn]:
    """Sums, differences, comparisons and counting on, below twenty."""
    turns = []
    for _ in range(6):
        a, b = int(rng.random() * 10), int(rng.random() * 10)
        high, low = max(a, b), min(a, b)
        turns.append(pick(rng, (
            (f"What is {a} + {b}?", str(a + b)),
            (f"{a} + {b} =", str(a + b)),
            (f"What is {high} - {low}?", str(high - low)),
            (f"Which is larger, {a} or {b}?", str(high)),
            (f"What comes after {a}?", str(a + 1)),
        )))  # fmt: skip
    return turns


def spelling_turns(rng: np.random.Generator) -> list[Turn]:
    """Words to letters and back; names of colours, shapes and places too."""
    turns = []
    for _ in range(5):
        word = pick(rng, (*LEXICON, *LEXICON, *COLOUR_NAMES, *SHAPES))
        letters = " ".join(word)
        turns.append(pick(rng, (
            (f"Spell {word}.", letters),
            (f"Which word is spelled {letters}?", word),
            (f"How many letters does {word} have?", str(len(word))),
            (f"What is the first letter of {word}?", word[0]),
            (f'Repeat the word "{word}".', word),
        )))  # fmt: skip
    return turns


def place_turns(rng: np.random.Generator) -> list[Turn]:
    """Relations between named places, the geometry behind left, right, above and below."""
    turns = []
    for _ in range(5):
        a, b = (int(c) for c in rng.permutation(9)[:2])
        options = []
        if a % 3 != b % 3:
            truth = "left" if a % 3 < b % 3 else "right"
            options.append((f"Is {CELLS[a]} to the left or to the right of {CELLS[b]}?", truth))
        if a // 3 != b // 3:
            truth = "above" if a // 3 < b // 3 else "below"
            options.append((f"Is {CELLS[a]} above or below {CELLS[b]}?", truth))
        turns.append(pick(rng, options))
    return turns


def table_turns(rng: np.random.Generator) -> list[Turn]:
    """Rows of the real tables, to be read back and compared."""
    table = pick(rng, load_tables())
    rows = [table.rows[int(i)] for i in rng.choice(len(table.rows), 2, replace=False)]
    (first, a), (second, b) = rows
    words = f"Table of {table.topic}: {first} {a:g}, {second} {b:g}."
    turns = [(f"{words}\nWhat is the value of {second}?", f"{b:g}")]
    turns.append((f"What is the value of {first}?", f"{a:g}"))
    if first != second and a != b:
        turns.append(("Which value is larger?", f"{max(a, b):g}"))
    return turns


# As in the reference set: what is hard to tell apart comes more often.
SHORTHAND_SHARES = {
    "microworld": 0.6,
    "digits": 0.12,
    "words": 0.06,
    "charts": 0.1,
    "photos": 0.02,
    "video": 0.1,
}

MAKERS: dict[str, Callable[[np.random.Generator], list[Turn]]] = {
    "lookup": lookup_turns,
    "shorthand": shorthand_turns,
    "scene": scene_turns,
    "thinking": thinking_turns,
    "other": other_turns,
    "arithmetic": arithmetic_turns,
    "spelling": spelling_turns,
    "place": place_turns,
    "table": table_turns,
}
# Shares of the corpus, our choice: pictures in shorthand carry every skill.
MAKER_SHARES = {
    "lookup": 0.3,
    "shorthand": 0.2,
    "scene": 0.01,
    "thinking": 0.4,
    "other": 0.01,
    "arithmetic": 0.05,
    "spelling": 0.01,
    "place": 0.01,
    "table": 0.01,
}


def text_samples(num: int, rng: np.random.Generator) -> Iterator[Sample]:
    """`num` conversations without images; task and `meta["kind"]` name the maker."""
    for i in range(num):
        kind = pick_weighted(rng, MAKER_SHARES)
        messages = []
        for question, answer in MAKERS[kind](rng):
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        meta = {"kind": kind, "think": kind == "thinking"}
        yield Sample(f"text-{i:06d}", "text", kind, messages, meta=meta)
