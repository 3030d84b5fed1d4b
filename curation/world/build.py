"""The data sets of the small world, as streams of samples drawn from one generator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

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
from curation.world.questions import yes_no
from curation.world.scene import pick_weighted
from curation.world.tags import tags
from sailyard.samples import SKILLS, Sample

# Shares of the reference set, our choice: shapes carry most skills, but digits, words and charts
# are harder to see.
REFERENCE_WEIGHTS: dict[str, float] = {
    "microworld": 0.4,
    "digits": 0.21,
    "words": 0.12,
    "charts": 0.12,
    "photos": 0.06,
    "video": 0.09,
}
# Of the reference images this share is captioned too: a caption is as long as three questions.
CAPTIONED = 0.5
QUESTIONS = 2


def reference_item(
    rng: np.random.Generator, image_size: int, weights: Mapping[str, float] = REFERENCE_WEIGHTS
) -> Item:
    """A rendered subject of a source drawn by weight."""
    return render(sample_subject(pick_weighted(rng, weights), rng), image_size)


def reference_samples(
    num_images: int,
    rng: np.random.Generator,
    image_size: int,
    weights: Mapping[str, float] = REFERENCE_WEIGHTS,
) -> Iterator[Sample]:
    """Clean data: up to two questions about every image, and a caption of a share CAPTIONED.

    Each is a sample of its own, so that no answer can be copied from the context; now and then
    the questions are one conversation. The first sample carries `meta["tags"]`, what the image
    shows.
    """
    for i in range(num_images):
        item = reference_item(rng, image_size, weights)
        qas = questions_of(item.subject, rng, QUESTIONS)
        talks = [qas] if num_turns(rng) > 1 else [[qa] for qa in qas]
        for k, talk in enumerate(talks):
            asked = qa_sample(f"ref-{i:06d}-qa{k}", item, talk)
            if k == 0:
                asked.meta["tags"] = tags(item.truth)
            yield asked
        if rng.random() < CAPTIONED:
            yield caption_sample(f"ref-{i:06d}-cap", item, caption_of(item.subject, rng), rng)


def heldout_samples(per_skill: int, rng: np.random.Generator, image_size: int) -> Iterator[Sample]:
    """`per_skill` single questions for every skill, on layouts that training never sees.

    Of yes-no questions every other one is to be answered with yes: who always says the same is
    right half the time.
    """
    for skill in SKILLS:
        for i in range(per_skill):
            subject, qa = ask_skill(skill, rng, heldout=True)
            while qa.answer in ("yes", "no") and qa.answer != yes_no(i % 2 == 0):
                subject, qa = ask_skill(skill, rng, heldout=True)
            yield qa_sample(f"heldout-{skill}-{i:05d}", render(subject, image_size), [qa])
