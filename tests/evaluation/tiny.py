"""A random network of the micro recipe's shape, and small data sets to run stages on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from curation.world.build import heldout_samples, reference_samples
from curation.world.items import ask_skill, caption_sample, qa_sample, render, sample_subject
from curation.world.items import caption_of as true_caption
from curation.world.spoil import maybe_spoil
from model.chat import THINKING_SUFFIX
from model.checkpoint import build_language, build_model, build_vision, save_model
from model.config import language_config_of, vision_config_of
from model.modeling import SailVLForConditionalGeneration
from model.processor import SailVLProcessor
from model.tokenizer import train_tokenizer
from sailyard.recipe import Recipe, load_recipe
from sailyard.samples import Sample, write_samples

SIZE = 84


def micro_recipe(*overrides: str) -> Recipe:
    """The recipe with a few steps a stage."""
    return load_recipe("micro", list(overrides))


def tiny_model(
    recipe: Recipe | None = None, seed: int = 0
) -> tuple[SailVLForConditionalGeneration, SailVLProcessor]:
    """A random model whose tokenizer knows the small world's words."""
    shape = (recipe or micro_recipe()).model
    tokenizer = train_tokenizer(_texts(), shape.language.vocab_size)
    processor = SailVLProcessor(
        tokenizer,
        image_size=shape.vision.image_size,
        patch_size=shape.vision.patch_size,
        downsample=shape.downsample,
        max_tiles=shape.max_tiles,
        use_thumbnail=shape.use_thumbnail,
        system_message=shape.system_message,
    )
    model = build_model(
        build_vision(vision_config_of(shape.vision), seed),
        build_language(language_config_of(shape.language, tokenizer), seed),
        image_token_id=processor.image_token_id,
        downsample=shape.downsample,
        seed=seed,
    )
    return model, processor


def save_tiny(directory: Path, seed: int = 0) -> Path:
    """A checkpoint directory of `tiny_model`."""
    model, processor = tiny_model(seed=seed)
    save_model(directory, model, processor)
    return directory


def captions(num: int, seed: int = 0, bad_rate: float = 0.3) -> Iterator[Sample]:
    """Caption samples, some spoilt."""
    rng = np.random.default_rng(seed)
    for i in range(num):
        item = render(sample_subject("microworld", rng), SIZE)
        caption, quality = maybe_spoil(item, true_caption(item.subject, rng), rng, bad_rate)
        yield caption_sample(f"cap-{i:05d}", item, caption, rng, quality=quality)


def pool(
    per_skill: int, seed: int = 0, skills: tuple[str, ...] = ("sum", "colour")
) -> list[Sample]:
    """Single verifiable questions with their answers in meta."""
    rng = np.random.default_rng(seed)
    made = []
    for skill in skills:
        for i in range(per_skill):
            subject, qa = ask_skill(skill, rng, heldout=False)
            made.append(qa_sample(f"pool-{skill}-{i:04d}", render(subject, SIZE), [qa]))
    return made


def write(directory: Path, samples: Iterator[Sample] | list[Sample]) -> Path:
    """The samples as a dataset directory."""
    write_samples(directory, samples)
    return directory


def heldout(directory: Path, per_skill: int) -> Path:
    """A held-out set as its stage makes it."""
    return write(directory, heldout_samples(per_skill, np.random.default_rng(9), SIZE))


def _texts() -> Iterator[str]:
    for sample in reference_samples(60, np.random.default_rng(1), SIZE):
        for message in sample.messages:
            yield message["content"]
    for _ in range(20):
        yield THINKING_SUFFIX
