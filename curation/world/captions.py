"""Captions in a fixed reading order: every object, digit or word that the image shows."""

from __future__ import annotations

import numpy as np

from curation.world.digits import DigitImage
from curation.world.motion import Motion
from curation.world.photos import PhotoCrop, with_article
from curation.world.questions import listing, plural
from curation.world.scene import Scene, pick, place
from curation.world.words import WordImage

PROMPTS = (
    "Describe the image.",
    "What is in the image?",
    "Write a caption.",
    "Describe what you see.",
)
VIDEO_PROMPTS = ("Describe the video.", "What happens in the video?")


def caption_scene(scene: Scene, rng: np.random.Generator) -> str:
    """Every object with its place; three times in ten the count comes first."""
    objects = listing(scene.things)
    if rng.random() < 0.3:
        return f"{plural(len(scene.things), 'object')}: {objects}"
    return objects


def caption_word(item: WordImage) -> str:
    return f'the word "{item.word}" in {item.colour}'


def caption_digits(item: DigitImage) -> str:
    if len(item.digits) == 1:
        return f"a handwritten {item.digits[0]}"
    return (
        f"a handwritten {item.digits[0]} on the left, a handwritten {item.digits[1]} on the right"
    )


def caption_motion(motion: Motion) -> str:
    moving = f"a {motion.mover.name} moves {motion.direction}"
    return ", ".join([moving, *(f"a {t.name} stands {place(t.cell)}" for t in motion.still)])


def caption_photo(crop: PhotoCrop, rng: np.random.Generator) -> str:
    named = with_article(crop.noun)
    return pick(rng, (f"a photo of {named}", f"this photo shows {named}"))
