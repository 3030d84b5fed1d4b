"""One image or clip of the small world with its truth, and the samples made from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation.world import captions, questions
from curation.world.chart_text import ask_chart, caption_chart, chart_questions
from curation.world.digits import DigitImage, draw_digits, sample_digits
from curation.world.draw import draw_scene, encode
from curation.world.motion import Motion, draw_motion, sample_motion
from curation.world.photos import PhotoCrop, draw_photo, sample_photo
from curation.world.plot_drawing import draw_chart
from curation.world.plots import EXTREME_KINDS, Chart, sample_chart
from curation.world.questions import QA, SCENE_ASKERS
from curation.world.scene import Scene, pick, sample_scene
from curation.world.words import WordImage, draw_word, sample_word
from model.chat import THINKING_SUFFIX
from sailyard.samples import Sample

Subject = Scene | DigitImage | WordImage | Chart | PhotoCrop | Motion
SOURCES = ("microworld", "digits", "words", "charts", "photos", "video")


@dataclass(frozen=True, slots=True)
class Item:
    """A rendered subject: its encoded images and `truth`, the value of `meta["scene"]`."""

    source: str
    subject: Subject
    images: tuple[bytes, ...]
    truth: dict[str, Any]

    @property
    def is_video(self) -> bool:
        return self.source == "video"


def sample_subject(source: str, rng: np.random.Generator, *, heldout: bool = False) -> Subject:
    """A random subject of one source, on the asked side of the split."""
    if source == "microworld":
        return sample_scene(rng, heldout=heldout)
    if source == "digits":
        return sample_digits(rng, 1 + int(rng.random() * 2), heldout=heldout)
    if source == "words":
        return sample_word(rng, heldout=heldout)
    if source == "charts":
        return sample_chart(rng, heldout=heldout)
    if source == "photos":
        return sample_photo(rng, heldout=heldout)
    if source == "video":
        return sample_motion(rng, heldout=heldout)
    raise ValueError(f"unknown source {source!r}; the small world has {', '.join(SOURCES)}")


def render(subject: Subject, image_size: int) -> Item:
    """Draw and encode a subject at `image_size` pixels a side (videos: one image a frame)."""
    if isinstance(subject, Scene):
        source, pictures = "microworld", [draw_scene(subject, image_size)]
    elif isinstance(subject, DigitImage):
        source, pictures = "digits", [draw_digits(subject, image_size)]
    elif isinstance(subject, WordImage):
        source, pictures = "words", [draw_word(subject, image_size)]
    elif isinstance(subject, Chart):
        source, pictures = "charts", [draw_chart(subject, image_size)]
    elif isinstance(subject, PhotoCrop):
        source, pictures = "photos", [draw_photo(subject, image_size)]
    else:
        source, pictures = "video", draw_motion(subject, image_size)
    return Item(source, subject, tuple(encode(p) for p in pictures), subject.meta())


def caption_of(subject: Subject, rng: np.random.Generator) -> str:
    """A complete and true caption."""
    if isinstance(subject, Scene):
        return captions.caption_scene(subject, rng)
    if isinstance(subject, DigitImage):
        return captions.caption_digits(subject)
    if isinstance(subject, WordImage):
        return captions.caption_word(subject)
    if isinstance(subject, Chart):
        return caption_chart(subject)
    if isinstance(subject, PhotoCrop):
        return captions.caption_photo(subject, rng)
    return captions.caption_motion(subject)


# Share of conversations that go on after the first answer, and how many questions they then have.
# Few, because earlier turns hide the picture from the later ones: what is asked at "top left" is
# looked up several times sooner when no other place has been talked about (docs/log.md).
SEVERAL_RATE = 0.1
MOST_TURNS = 4


def num_turns(rng: np.random.Generator) -> int:
    """How many questions one conversation about a picture gets: mostly one."""
    if rng.random() >= SEVERAL_RATE:
        return 1
    return 2 + int(rng.random() * (MOST_TURNS - 1))


def questions_of(subject: Subject, rng: np.random.Generator, num: int) -> list[QA]:
    """Up to `num` different questions about a subject, in random order."""
    q = questions
    found: list[QA | None]
    if isinstance(subject, Scene):
        return q.scene_questions(subject, rng, num)
    if isinstance(subject, DigitImage) and len(subject.digits) == 2:
        askers = (q.ask_sum, q.ask_digit, q.ask_digit, pick(rng, (q.ask_larger, q.ask_digit_check)))
        found = [askers[int(i)](subject, rng) for i in rng.permutation(len(askers))]
    elif isinstance(subject, DigitImage):
        found = [q.ask_digit(subject, rng), q.ask_digit_check(subject, rng)]
    elif isinstance(subject, WordImage):
        found = [q.ask_word(subject, rng), pick(rng, q.ask_word_extra(subject, rng))]
    elif isinstance(subject, Chart):
        found = list(chart_questions(subject, rng, num))
    elif isinstance(subject, PhotoCrop):
        found = [q.ask_photo(subject, rng), q.ask_photo_check(subject, rng)]
    else:
        found = [q.ask_motion(subject, rng), pick(rng, q.ask_motion_extra(subject, rng))]
    different = {qa.question: qa for qa in found if qa is not None}
    out = list(different.values())[:num]
    return [out[int(i)] for i in rng.permutation(len(out))]


def ask_skill(skill: str, rng: np.random.Generator, *, heldout: bool = False) -> tuple[Subject, QA]:
    """A subject and one question of `skill` about it, drawn until the subject allows it."""
    while True:
        subject: Subject
        qa: QA | None
        if skill in SCENE_ASKERS:
            subject = sample_scene(rng, heldout=heldout)
            qa = SCENE_ASKERS[skill](subject, rng)
        elif skill == "word":
            subject = sample_word(rng, heldout=heldout)
            qa = questions.ask_word(subject, rng)
        elif skill == "digit":
            subject = sample_digits(rng, 1, heldout=heldout)
            qa = questions.ask_digit(subject, rng)
        elif skill == "sum":
            subject = sample_digits(rng, 2, heldout=heldout)
            qa = questions.ask_sum(subject, rng)
        elif skill == "chart":
            subject = sample_chart(rng, heldout=heldout)
            if subject.kind in EXTREME_KINDS:  # the skill is reading a number
                continue
            qa = ask_chart(subject, rng)
        elif skill == "motion":
            subject = sample_motion(rng, heldout=heldout)
            qa = questions.ask_motion(subject, rng)
        elif skill == "photo":
            subject = sample_photo(rng, heldout=heldout)
            qa = questions.ask_photo(subject, rng)
        else:
            raise ValueError(f"unknown skill {skill!r}")
        if qa is not None:
            return subject, qa


def user_turn(item: Item, text: str) -> str:
    """The first user turn: one placeholder per image, frames numbered, then the text."""
    if item.is_video:
        return "".join(f"Frame-{i + 1}: <image>\n" for i in range(len(item.images))) + text
    return "<image>\n" * len(item.images) + text


def caption_sample(
    sample_id: str, item: Item, caption: str, rng: np.random.Generator, *, quality: str = "clean"
) -> Sample:
    """One caption as a conversation. `quality` names how the caption was spoilt."""
    prompt = pick(rng, captions.VIDEO_PROMPTS if item.is_video else captions.PROMPTS)
    messages = [
        {"role": "user", "content": user_turn(item, prompt)},
        {"role": "assistant", "content": caption},
    ]
    meta = {"scene": item.truth, "caption": caption, "quality": quality}
    return Sample(
        sample_id, item.source, "caption", messages, list(item.images), item.is_video, meta
    )


def qa_sample(sample_id: str, item: Item, qas: Sequence[QA]) -> Sample:
    """Several questions about one item as the turns of one conversation."""
    messages: list[dict[str, str]] = []
    for i, qa in enumerate(qas):
        text = user_turn(item, qa.question) if i == 0 else qa.question
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": qa.answer}]
    task = qas[0].skill if len({qa.skill for qa in qas}) == 1 else "mixed"
    meta: dict[str, Any] = {"scene": item.truth}
    if len(qas) == 1:
        meta |= qas[0].meta()
    else:
        meta["questions"] = [qa.meta() for qa in qas]
    return Sample(sample_id, item.source, task, messages, list(item.images), item.is_video, meta)


def thinking_sample(sample_id: str, item: Item, qa: QA) -> Sample:
    """One question with the released thinking suffix, answered by a chain and a boxed answer."""
    sample = qa_sample(sample_id, item, [qa])
    sample.messages[0]["content"] += "\n" + THINKING_SUFFIX
    sample.messages[1]["content"] = qa.thinking()
    sample.meta |= {"think": True, "chain": qa.chain}
    return sample
