"""Raw material with the faults of the real thing: clips, instruction sources, RL prompts.

Curation has to find what is planted here: wrong answers, clips in which nothing moves, a source
that repeats itself, questions as multiple choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from PIL import Image

from curation.world import questions
from curation.world.build import reference_item
from curation.world.draw import encode
from curation.world.items import (
    Item,
    ask_skill,
    caption_of,
    caption_sample,
    num_turns,
    qa_sample,
    questions_of,
    render,
    sample_subject,
)
from curation.world.motion import DIRECTION_NAMES, Motion, sample_motion
from curation.world.photos import NOUNS
from curation.world.questions import QA, box_text
from curation.world.scene import CELLS, COLOUR_NAMES, SHAPES, pick, pick_weighted
from curation.world.spoil import maybe_spoil
from curation.world.words import LEXICON
from model.chat import SHORT_ANSWER_SUFFIX
from sailyard.samples import Sample

_POOLS: tuple[tuple[str, ...], ...] = (
    COLOUR_NAMES, SHAPES, LEXICON, NOUNS, DIRECTION_NAMES, CELLS, ("yes", "no"),
)  # fmt: skip


def wrong_answer(qa: QA, rng: np.random.Generator) -> str:
    """An answer of the right form that is not the right one."""
    if qa.check == "number":
        return str((int(qa.answer) + 1 + int(rng.random() * 8)) % 10)
    if qa.check == "box":
        x, y = int(rng.random() * 70) * 10, int(rng.random() * 70) * 10
        return box_text((x, y, x + 240, y + 240))
    for pool in _POOLS:
        if qa.answer in pool:
            return pick(rng, [a for a in pool if a != qa.answer])
    return pick(rng, COLOUR_NAMES) + " " + pick(rng, SHAPES)


# --- captions -------------------------------------------------------------------------------------


def raw_captions(
    counts: dict[str, int], rng: np.random.Generator, image_size: int, bad_rate: float
) -> Iterator[Sample]:
    """`counts` captions per source, in random order; `meta["quality"]` names a corruption."""
    sources = [source for source, num in counts.items() for _ in range(num)]
    for i, index in enumerate(rng.permutation(len(sources))):
        item = render(sample_subject(sources[int(index)], rng), image_size)
        caption, quality = maybe_spoil(item, caption_of(item.subject, rng), rng, bad_rate)
        yield caption_sample(f"cap-{i:07d}", item, caption, rng, quality=quality)


# --- clips ----------------------------------------------------------------------------------------

# Shares of what goes wrong with a raw clip, our choice; the rest is sound.
CLIP_FAULTS = {"none": 0.84, "wrong_answer": 0.06, "static": 0.05, "blank": 0.05}
CLIP_QUESTIONS = {"direction": 0.65, "who": 0.15, "check": 0.1, "colour": 0.1}


def _clip_question(motion: Motion, rng: np.random.Generator) -> QA:
    kind = pick_weighted(rng, CLIP_QUESTIONS)
    if kind == "direction":
        return questions.ask_motion(motion, rng)
    return questions.ask_motion_extra(motion, rng)[("who", "check", "colour").index(kind)]


def raw_clips(num: int, rng: np.random.Generator, image_size: int) -> Iterator[Sample]:
    """`num` clips with one question each; `meta["fault"]` names what is wrong with one."""
    for i in range(num):
        fault = pick_weighted(rng, CLIP_FAULTS)
        motion = sample_motion(rng, travel=0.02 if fault == "static" else None)
        item = render(motion, image_size)
        if fault == "blank":
            black = encode(Image.new("RGB", (image_size, image_size)))
            item = replace(item, images=(black,) * len(item.images))
            item.truth["blank"] = True
        qa = _clip_question(motion, rng)
        sample = qa_sample(f"clip-{i:06d}", item, [qa])
        if fault == "wrong_answer":
            sample.messages[-1]["content"] = wrong_answer(qa, rng)
        sample.meta["fault"] = fault
        yield sample


# --- instructions ---------------------------------------------------------------------------------

# Named sources and their shares, our choice. "noisy" answers at random, "redundant" asks the same
# few things again and again; both must be noticed by curation, not known to it.
INSTRUCTION_SOURCES = {
    "instruct-scenes": 0.22,
    "instruct-grounding": 0.1,
    "instruct-reading": 0.2,
    "instruct-charts": 0.11,
    "instruct-photos": 0.05,
    "instruct-reasoning": 0.22,
    "instruct-noisy": 0.05,
    "instruct-redundant": 0.05,
}

# What the reasoning source asks: counting is learnt from captions already.
REASONING = {"sum": 0.35, "existence": 0.25, "relation": 0.3, "count": 0.1}

# The redundant source holds this many different samples, each many times.
_NUM_REDUNDANT, _REDUNDANT_SEED = 12, 77


def _instruction_item(source: str, rng: np.random.Generator, image_size: int) -> Item:
    subjects = {
        "instruct-scenes": ("microworld",),
        "instruct-reading": ("words", "digits"),
        "instruct-charts": ("charts",),
        "instruct-photos": ("photos",),
    }
    if source == "instruct-noisy":
        return reference_item(rng, image_size)
    return render(sample_subject(pick(rng, subjects[source]), rng), image_size)


def _instruction(
    source: str, name: str, rng: np.random.Generator, image_size: int, noise: float
) -> Sample:
    if source == "instruct-reasoning":
        subject, qa = ask_skill(pick_weighted(rng, REASONING), rng)
        return qa_sample(name, render(subject, image_size), [qa])
    if source == "instruct-grounding":
        subject, qa = ask_skill("box", rng)
        return qa_sample(name, render(subject, image_size), [qa])
    if source == "instruct-redundant":
        again = np.random.default_rng([_REDUNDANT_SEED, int(rng.random() * _NUM_REDUNDANT)])
        subject, qa = ask_skill("existence" if again.random() < 0.5 else "count", again)
        return qa_sample(name, render(subject, image_size), [qa])
    item = _instruction_item(source, rng, image_size)
    qas = questions_of(item.subject, rng, num_turns(rng))
    sample = qa_sample(name, item, qas)
    if source == "instruct-noisy":
        for qa, answer in zip(qas, sample.messages[1::2], strict=True):
            if rng.random() < noise:
                answer["content"] = wrong_answer(qa, rng)
    elif rng.random() < 0.2:
        # Some sources carry a format hint, which longer answers would contradict.
        sample.messages[0]["content"] += SHORT_ANSWER_SUFFIX
    return sample


def raw_instructions(
    num: int, rng: np.random.Generator, image_size: int, noise: float
) -> Iterator[Sample]:
    """`num` instruction samples over INSTRUCTION_SOURCES, `source` naming each.

    In meta, "answer" (one turn) or "questions" (several) hold the truth, whatever the turns say.
    A share `noise` of the answers of "instruct-noisy" is wrong.
    """
    for i in range(num):
        source = pick_weighted(rng, INSTRUCTION_SOURCES)
        sample = _instruction(source, f"ins-{i:06d}", rng, image_size, noise)
        sample.source = source
        yield sample


# --- prompts for reinforcement learning -----------------------------------------------------------

PROMPT_SKILLS = {
    "count": 0.17,
    "sum": 0.15,
    "relation": 0.12,
    "existence": 0.12,
    "colour": 0.06,
    "shape": 0.06,
    "digit": 0.09,
    "chart": 0.09,
    "word": 0.06,
    "box": 0.04,
    "photo": 0.02,
    "motion": 0.02,
}
CHOICE_RATE = 0.3
_LETTERS = "ABCD"


def as_choice(sample: Sample, qa: QA, rng: np.random.Generator) -> None:
    """Turn a numeric question into multiple choice, as many public math sets come."""
    options = {qa.answer}
    while len(options) < len(_LETTERS):
        options.add(wrong_answer(qa, rng))
    ordered = sorted(options, key=int)
    lines = [f"{letter}. {text}" for letter, text in zip(_LETTERS, ordered, strict=True)]
    sample.messages[0]["content"] += "\n" + "\n".join(lines)
    letter = _LETTERS[ordered.index(qa.answer)]
    chain = f"{qa.chain} That is option {letter}."
    sample.meta |= {"answer": letter, "check": "exact", "chain": chain}


def prompt_pool(num: int, rng: np.random.Generator, image_size: int) -> Iterator[Sample]:
    """`num` single questions with a verifiable answer; sums come partly as multiple choice.

    The conversation ends in the user's turn; meta holds "answer", "check", "skill", "kind" and
    the guided "chain".
    """
    for i in range(num):
        skill = pick_weighted(rng, PROMPT_SKILLS)
        subject, qa = ask_skill(skill, rng)
        sample = qa_sample(f"rl-{i:06d}", render(subject, image_size), [qa])
        del sample.messages[1:]
        if skill == "sum" and rng.random() < CHOICE_RATE:
            as_choice(sample, qa, rng)
        yield sample
