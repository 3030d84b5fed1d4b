"""Stage curation.vqa: questions and answers out of each caption, from its text alone.

The paper has a language model read the caption (section 3.1.2); the small world's captions are
read by their grammar. A caption that is wrong gives wrong answers, as it does there: where the
truth is known, the share of right answers is reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from curation.world import questions
from curation.world.answering import agrees, answer_question
from curation.world.digits import DigitImage
from curation.world.grammar import Claims, parse_caption
from curation.world.motion import Motion
from curation.world.photos import PhotoCrop
from curation.world.questions import QA
from curation.world.scene import Scene, Thing, pick
from curation.world.words import WordImage
from sailyard.samples import Sample, SampleReader, write_samples

if TYPE_CHECKING:
    from sailyard.stage import StageContext

# Attempts per wanted question: some draws repeat an earlier one or are not allowed.
_TRIES = 4
_BLANK = (255, 255, 255)


def claimed_scene(claims: Claims) -> Scene | None:
    """The scene as the caption has it; None unless every object has colour, shape and place."""
    things = []
    for claim in sorted(claims.things, key=lambda c: -1 if c.cell is None else c.cell):
        if claim.colour is None or claim.shape is None or claim.cell is None:
            return None
        things.append(Thing(claim.cell, claim.shape, claim.colour, 0.5, 0.5, 0.1))
    return Scene(tuple(things), _BLANK, 0) if things else None


def _scene_questions(scene: Scene, rng: np.random.Generator) -> QA | None:
    # No boxes: a caption does not give them.
    names = [name for name in questions.SCENE_TURN if name != "box"]
    return questions.SCENE_ASKERS[pick(rng, names)](scene, rng)


def _fact(claims: Claims, name: str) -> tuple[str, ...] | None:
    return next((fact[1:] for fact in sorted(claims.facts) if fact[0] == name), None)


def _claimed_digits(claims: Claims) -> DigitImage | None:
    digits = [int(fact[2]) for fact in sorted(claims.facts) if fact[0] == "digit"]
    if len(digits) not in (1, 2):
        return None
    return DigitImage(tuple(digits), (), (), 0.5, 0, _BLANK, 0)


def _claimed_motion(claims: Claims) -> Motion | None:
    mover, direction = _fact(claims, "mover"), _fact(claims, "direction")
    scene = claimed_scene(claims)
    if mover is None or direction is None or (claims.things and scene is None):
        return None
    thing = Thing(4, mover[1], mover[0], 0.5, 0.5, 0.1)
    return Motion(thing, scene.things if scene else (), direction[0], 0.4, 2, _BLANK, 0)


def _one_question(claims: Claims, rng: np.random.Generator) -> QA | None:
    """One question that the claims answer; None where this draw found none."""
    if claims.kind == "scene":
        scene = claimed_scene(claims)
        return _scene_questions(scene, rng) if scene else None
    if claims.kind == "word" and (word := _fact(claims, "word")) and (ink := _fact(claims, "ink")):
        printed = WordImage(word[0], ink[0], 0.5, 0.5, 0.2, _BLANK, 0)
        return pick(
            rng, [questions.ask_word(printed, rng), *questions.ask_word_extra(printed, rng)]
        )
    if claims.kind == "digits" and (digits := _claimed_digits(claims)):
        askers = [questions.ask_digit, questions.ask_digit_check]
        if len(digits.digits) == 2:
            return pick(rng, [*askers, questions.ask_sum, questions.ask_larger])(digits, rng)
        return pick(rng, askers)(digits, rng)
    if claims.kind == "photo" and (noun := _fact(claims, "noun")):
        crop = PhotoCrop(noun[0], 0, 0, 0, False, 1.0)
        return pick(rng, (questions.ask_photo, questions.ask_photo_check))(crop, rng)
    if claims.kind == "motion" and (motion := _claimed_motion(claims)):
        return pick(
            rng, [questions.ask_motion(motion, rng), *questions.ask_motion_extra(motion, rng)]
        )
    return None


def caption_questions(caption: str, rng: np.random.Generator, num: int) -> list[QA]:
    """Up to `num` different questions that the caption's own words answer."""
    claims = parse_caption(caption)
    if claims.num_unparsed:
        return []
    found: dict[str, QA] = {}
    for _ in range(num * _TRIES):
        if len(found) == num:
            break
        qa = _one_question(claims, rng)
        if qa is not None:
            found.setdefault(qa.question, qa)
    return list(found.values())


def vqa_sample(caption: Sample, number: int, qa: QA) -> Sample:
    """The caption's image with one question, the caption's `number`-th."""
    opening = caption.messages[0]["content"]
    images = opening[: opening.rindex("<image>\n") + len("<image>\n")]
    messages = [
        {"role": "user", "content": images + qa.question},
        {"role": "assistant", "content": qa.answer},
    ]
    meta = {"skill": qa.skill, "kind": qa.kind, "answer": qa.answer, "from_caption": caption.id}
    if "scene" in caption.meta:
        meta["scene"] = caption.meta["scene"]
    return Sample(
        f"vqa-{caption.id}-{number}",
        caption.source,
        qa.skill,
        messages,
        caption.images,
        caption.is_video,
        meta,
    )


def run(ctx: StageContext) -> None:
    """The stage: kept captions in, question samples out, with their measured correctness."""
    recipe = ctx.section("curation.vqa")
    captions = SampleReader(ctx.input("captions"))
    rng = np.random.default_rng(ctx.seed)
    num = min(len(captions), recipe.num_captions)
    chosen = sorted(int(i) for i in rng.permutation(len(captions))[:num])
    tally: Counter[str] = Counter()
    skills: Counter[str] = Counter()

    def samples() -> Iterator[Sample]:
        for done, index in enumerate(chosen, 1):
            ctx.progress(done, num)
            sample = captions[index]
            text = sample.messages[-1]["content"]
            qas = caption_questions(text, rng, recipe.questions_per_caption)
            if not qas:
                tally["unreadable_captions"] += 1
                continue
            truth = sample.meta.get("scene")
            for number, qa in enumerate(qas):
                skills[qa.skill] += 1
                tally["questions"] += 1
                if truth is not None:
                    tally["checked"] += 1
                    tally["right"] += agrees(qa.answer, answer_question(qa.question, truth))
                yield vqa_sample(sample, number, qa)

    count = write_samples(ctx.output("vqa"), samples())
    ctx.summary(
        num_captions=num,
        num_samples=count,
        num_questions=tally["questions"],
        unreadable_captions=tally["unreadable_captions"],
        correct=tally["right"] / tally["checked"] if tally["checked"] else None,
        skills=dict(skills),
    )
