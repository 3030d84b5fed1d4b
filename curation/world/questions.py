"""Questions about the small world, with answers and reasons computed from the truth.

Each `ask_*` returns None when the item does not allow the question (an ambiguous name, objects
that are not clearly apart), so callers try another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from curation.world.digits import DigitImage
from curation.world.motion import DIRECTION_NAMES, Motion
from curation.world.photos import NOUNS, PhotoCrop, with_article
from curation.world.scene import CELLS, COLOUR_NAMES, SHAPES, Scene, Thing, pick, place
from curation.world.words import LEXICON, WordImage


@dataclass(frozen=True, slots=True)
class QA:
    """A question with its short answer. `chain` is a guided reason, "" where none is written.

    `check` says how an answer is compared: "exact", "number" or "box". `kind` is finer than the
    skill ("count.colour").
    """

    question: str
    answer: str
    check: str
    skill: str
    kind: str
    chain: str = ""

    def meta(self) -> dict[str, str]:
        """Truth about the question for a sample's meta."""
        known = {"answer": self.answer, "check": self.check, "skill": self.skill, "kind": self.kind}
        return known | ({"chain": self.chain} if self.chain else {})

    def thinking(self) -> str:
        """The target when the model is asked to think first."""
        return f"<think>{self.chain}</think>\n\\boxed{{{self.answer}}}"


def plural(num: int, noun: str) -> str:
    return f"{num} {noun}" if num == 1 else f"{num} {noun}s"


def listing(things: tuple[Thing, ...] | list[Thing]) -> str:
    """ "a red circle at the top left, a blue square in the center", in reading order."""
    return ", ".join(f"a {t.name} {place(t.cell)}" for t in things)


def _unique(scene: Scene) -> list[Thing]:
    names = Counter(t.name for t in scene.things)
    return [t for t in scene.things if names[t.name] == 1]


def yes_no(truth: bool) -> str:
    return "yes" if truth else "no"


def ask_count(scene: Scene, rng: np.random.Generator) -> QA:
    """All objects (three times in four), or those of one colour or one shape."""
    seen = f"I see {listing(scene.things)}."
    if rng.random() < 0.75:
        question = pick(rng, (
            "How many objects are there?", "How many shapes are in the image?",
            "Count the objects.", "What is the number of objects?",
        ))  # fmt: skip
        num = len(scene.things)
        chain = f"{seen} That is {plural(num, 'object')}."
        return QA(question, str(num), "number", "count", "count.all", chain)
    thing = pick(rng, scene.things)
    if rng.random() < 0.5:
        wanted = thing.colour if rng.random() < 0.8 else pick(rng, COLOUR_NAMES)
        matching = [t for t in scene.things if t.colour == wanted]
        noun, kind = f"{wanted} object", "count.colour"
    else:
        wanted = thing.shape if rng.random() < 0.8 else pick(rng, SHAPES)
        matching = [t for t in scene.things if t.shape == wanted]
        noun, kind = wanted, "count.shape"
    nouns = noun + ("es" if noun.endswith("s") else "s")
    question = pick(rng, (f"How many {nouns} are there?", f"Count the {nouns}."))
    num = len(matching)
    found = f"Of these, {listing(matching)} counts." if num else "None of these counts."
    if num > 1:
        found = f"Of these, {listing(matching)} count."
    return QA(question, str(num), "number", "count", kind, f"{seen} {found} That is {num}.")


def ask_existence(scene: Scene, rng: np.random.Generator) -> QA:
    """A named object, yes or no with equal chance; half of the absent ones are near misses."""
    present = {(t.colour, t.shape) for t in scene.things}
    truth = bool(rng.random() < 0.5)
    if truth:
        colour, shape = pick(rng, sorted(present))
    else:
        thing = pick(rng, scene.things)
        while True:
            colour, shape = pick(rng, COLOUR_NAMES), pick(rng, SHAPES)
            near = rng.random()
            if near < 0.25:
                colour = thing.colour
            elif near < 0.5:
                shape = thing.shape
            if (colour, shape) not in present:
                break
    question = pick(rng, (
        f"Is there a {colour} {shape}?", f"Can you see a {colour} {shape}?",
        f"Does the image show a {colour} {shape}?",
    ))  # fmt: skip
    nearest = _nearest(scene, colour, shape)
    # What is asked and what was found stand side by side: a small network compares neighbours,
    # not a question with a list of four (docs/log.md).
    chain = (
        f"As the nearest to a {colour} {shape} I see {listing([nearest])}. "
        f"Asked: {colour} {shape}. Found: {nearest.name}. "
        f"There is {'a' if truth else 'no'} {colour} {shape}."
    )
    return QA(question, yes_no(truth), "exact", "existence", "existence.named", chain)


def _nearest(scene: Scene, colour: str, shape: str) -> Thing:
    """The thing that shares most with a name; colour before shape, then reading order."""
    return max(scene.things, key=lambda t: 2 * (t.colour == colour) + (t.shape == shape))


def _colour_chain(thing: Thing) -> str:
    return f"The object {place(thing.cell)} is a {thing.name}. Its colour is {thing.colour}."


def _shape_chain(thing: Thing) -> str:
    return f"The object {place(thing.cell)} is a {thing.name}. Its shape is {thing.shape}."


def ask_colour(scene: Scene, rng: np.random.Generator) -> QA:
    """The colour of the object in a cell (four times in five), or of a shape seen once."""
    shapes = Counter(t.shape for t in scene.things)
    single = [t for t in scene.things if shapes[t.shape] == 1]
    if single and rng.random() < 0.2:
        thing = pick(rng, single)
        question = pick(
            rng, (f"What colour is the {thing.shape}?", f"Name the colour of the {thing.shape}.")
        )
        return QA(question, thing.colour, "exact", "colour", "colour.shape", _colour_chain(thing))
    thing = pick(rng, scene.things)
    where = place(thing.cell)
    question = pick(rng, (
        f"What colour is the object {where}?", f"Which colour does the object {where} have?",
        f"Name the colour of the object {where}.",
    ))  # fmt: skip
    return QA(question, thing.colour, "exact", "colour", "colour.place", _colour_chain(thing))


def ask_shape(scene: Scene, rng: np.random.Generator) -> QA:
    """The shape of the object in a cell (four times in five), or of a colour seen once."""
    colours = Counter(t.colour for t in scene.things)
    single = [t for t in scene.things if colours[t.colour] == 1]
    if single and rng.random() < 0.2:
        thing = pick(rng, single)
        question = pick(
            rng,
            (
                f"What shape is the {thing.colour} object?",
                f"Name the shape of the {thing.colour} object.",
            ),
        )
        return QA(question, thing.shape, "exact", "shape", "shape.colour", _shape_chain(thing))
    thing = pick(rng, scene.things)
    where = place(thing.cell)
    question = pick(rng, (
        f"What shape is the object {where}?", f"Which shape does the object {where} have?",
        f"Name the shape of the object {where}.",
    ))  # fmt: skip
    return QA(question, thing.shape, "exact", "shape", "shape.place", _shape_chain(thing))


RELATIONS = {
    "to the left of": ("column", -1),
    "to the right of": ("column", 1),
    "above": ("row", -1),
    "below": ("row", 1),
}


def ask_relation(scene: Scene, rng: np.random.Generator) -> QA | None:
    """Whether one object stands left, right, above or below another, in another column or row."""
    named = _unique(scene)
    axis = "column" if rng.random() < 0.5 else "row"
    pairs = [
        (a, b) for a in named for b in named if a is not b and getattr(a, axis) != getattr(b, axis)
    ]
    if not pairs:
        return None
    a, b = pick(rng, pairs)
    truth = bool(rng.random() < 0.5)
    sign = 1 if getattr(a, axis) > getattr(b, axis) else -1
    wanted = sign if truth else -sign
    words = next(w for w, (ax, s) in RELATIONS.items() if ax == axis and s == wanted)
    actual = next(w for w, (ax, s) in RELATIONS.items() if ax == axis and s == sign)
    question = pick(rng, (
        f"Is the {a.name} {words} the {b.name}?", f"Does the {a.name} lie {words} the {b.name}?",
    ))  # fmt: skip
    chain = (
        f"The {a.name} is {place(a.cell)}. The {b.name} is {place(b.cell)}. "
        f"So the {a.name} is {actual} the {b.name}. "
        f"Asked: {words}. Found: {actual}."
    )
    return QA(question, yes_no(truth), "exact", "relation", "relation." + axis, chain)


def box_text(box: tuple[int, int, int, int]) -> str:
    return f"<box>({box[0]},{box[1]}),({box[2]},{box[3]})</box>"


def ask_box(scene: Scene, rng: np.random.Generator) -> QA | None:
    """The box of an object whose name is unique in the scene."""
    named = _unique(scene)
    if not named:
        return None
    thing = pick(rng, named)
    question = pick(rng, (
        f"Give the box of the {thing.name}.", f"Locate the {thing.name} with a box.",
        f"What is the box of the {thing.name}?",
    ))  # fmt: skip
    box = box_text(thing.box())
    chain = f"The {thing.name} is {place(thing.cell)}. Its box is {box}."
    return QA(question, box, "box", "box", "box.named", chain)


def ask_where(scene: Scene, rng: np.random.Generator) -> QA | None:
    """The cell of a uniquely named object: dense supervision, not a skill of the evaluation."""
    named = _unique(scene)
    if not named:
        return None
    thing = pick(rng, named)
    question = pick(rng, (f"Where is the {thing.name}?", f"In which place is the {thing.name}?"))
    return QA(question, CELLS[thing.cell], "exact", "relation", "where")


def ask_inventory(scene: Scene, rng: np.random.Generator) -> QA:
    """What lies where, place first, in any order: dense supervision for looking at a place."""
    things = [scene.things[int(i)] for i in rng.permutation(len(scene.things))]
    answer = ", ".join(f"{CELLS[t.cell]}: {t.name}" for t in things)
    return QA("Name things by place.", answer, "exact", "colour", "inventory")


def ask_word(item: WordImage, rng: np.random.Generator) -> QA:
    question = pick(rng, (
        "What word is written here?", "Read the word.", "Which word does the image show?",
    ))  # fmt: skip
    chain = f"The letters are {' '.join(item.word)}. The word is {item.word}."
    return QA(question, item.word, "exact", "word", "word.read", chain)


def ask_word_extra(item: WordImage, rng: np.random.Generator) -> list[QA]:
    """Spelling, first letter, ink and a yes-no check: dense supervision for reading."""
    truth = bool(rng.random() < 0.5)
    other = item.word
    while other == item.word:
        other = pick(rng, LEXICON)
    asked = item.word if truth else other
    return [
        QA("Spell the word.", " ".join(item.word), "exact", "word", "word.spell"),
        QA("What is the first letter?", item.word[0], "exact", "word", "word.first"),
        QA(
            "How many letters does the word have?",
            str(len(item.word)),
            "number",
            "word",
            "word.length",
        ),
        QA("What colour is the word?", item.colour, "exact", "colour", "colour.word"),
        QA(f'Is the word "{asked}"?', yes_no(truth), "exact", "word", "word.check"),
    ]


def ask_digit(item: DigitImage, rng: np.random.Generator) -> QA:
    """A single digit, or the left or right one of two."""
    if len(item.digits) == 1:
        question = pick(
            rng, ("What digit is this?", "Which digit is written here?", "Read the digit.")
        )
        digit = item.digits[0]
        return QA(question, str(digit), "number", "digit", "digit.read", f"The digit is {digit}.")
    side = int(rng.random() * 2)
    name = ("left", "right")[side]
    question = pick(rng, (f"What is the {name} digit?", f"Read the {name} digit."))
    digit = item.digits[side]
    chain = f"The {name} digit is {digit}."
    return QA(question, str(digit), "number", "digit", f"digit.{name}", chain)


def ask_digit_check(item: DigitImage, rng: np.random.Generator) -> QA:
    digit = item.digits[0]
    truth = bool(rng.random() < 0.5)
    asked = digit if truth else (digit + 1 + int(rng.random() * 9)) % 10
    where = "digit" if len(item.digits) == 1 else "left digit"
    return QA(f"Is the {where} a {asked}?", yes_no(truth), "exact", "digit", "digit.check")


def ask_sum(item: DigitImage, rng: np.random.Generator) -> QA:
    left, right = item.digits
    question = pick(rng, (
        "What is the sum of the two digits?", "Add the two digits.",
        "What do the left and the right digit add up to?",
    ))  # fmt: skip
    chain = (
        f"The left digit is {left}. The right digit is {right}. {left} + {right} = {left + right}."
    )
    return QA(question, str(left + right), "number", "sum", "sum", chain)


def ask_larger(item: DigitImage, rng: np.random.Generator) -> QA | None:
    """Which of two digits is larger; dense supervision."""
    left, right = item.digits
    if left == right:
        return None
    return QA("Which digit is larger?", str(max(left, right)), "number", "digit", "digit.larger")


def ask_motion(motion: Motion, rng: np.random.Generator) -> QA:
    if motion.still:
        name = f"the {motion.mover.name}"
        question = pick(
            rng, (f"In which direction does {name} move?", f"Which way does {name} go?")
        )
    else:
        question = pick(rng, (
            "In which direction does the object move?", "Which way does the object go?",
            "Where does the object move to?",
        ))  # fmt: skip
    first, last = (CELLS[cell] for cell in motion.ends())
    chain = f"It goes from the {first} to the {last}. It moves {motion.direction}."
    return QA(question, motion.direction, "exact", "motion", "motion.direction", chain)


def ask_motion_extra(motion: Motion, rng: np.random.Generator) -> list[QA]:
    """Who moves, how many frames and a yes-no check of the direction."""
    truth = bool(rng.random() < 0.5)
    others = [d for d in DIRECTION_NAMES if d != motion.direction]
    asked = motion.direction if truth else pick(rng, others)
    return [
        QA("Which object moves?", motion.mover.name, "exact", "motion", "motion.who"),
        QA(f"Does it move {asked}?", yes_no(truth), "exact", "motion", "motion.check"),
        QA(
            "What colour is the moving object?",
            motion.mover.colour,
            "exact",
            "colour",
            "colour.mover",
        ),
    ]


def ask_photo(crop: PhotoCrop, rng: np.random.Generator) -> QA:
    question = pick(
        rng, ("What does the photo show?", "What is this a photo of?", "Name what is in the photo.")
    )
    chain = f"The photo shows {with_article(crop.noun)}."
    return QA(question, crop.noun, "exact", "photo", "photo.noun", chain)


def ask_photo_check(crop: PhotoCrop, rng: np.random.Generator) -> QA:
    truth = bool(rng.random() < 0.5)
    others = [n for n in NOUNS if n != crop.noun]
    asked = crop.noun if truth else pick(rng, others)
    return QA(
        f"Does the photo show {with_article(asked)}?",
        yes_no(truth),
        "exact",
        "photo",
        "photo.check",
    )


SCENE_ASKERS: dict[str, Callable[[Scene, np.random.Generator], QA | None]] = {
    "count": ask_count,
    "existence": ask_existence,
    "colour": ask_colour,
    "shape": ask_shape,
    "relation": ask_relation,
    "box": ask_box,
    "where": ask_where,
    "inventory": ask_inventory,
}

# Whose turn it is to ask about a scene. Colour and shape stand twice: boxes, relations and
# captions build on looking at a place.
SCENE_TURN = (*SCENE_ASKERS, "colour", "shape")


def scene_questions(scene: Scene, rng: np.random.Generator, num: int) -> list[QA]:
    """Up to `num` different questions about one scene, and one at least: a SCENE_TURN at random."""
    order = [SCENE_TURN[int(i)] for i in rng.permutation(len(SCENE_TURN))]
    found: dict[str, QA] = {}
    for attempt in range(max(num * 3, len(order))):
        if len(found) == num:
            break
        qa = SCENE_ASKERS[order[attempt % len(order)]](scene, rng)
        if qa is not None:
            found.setdefault(qa.question, qa)
    out = list(found.values())
    return [out[int(i)] for i in rng.permutation(len(out))]
