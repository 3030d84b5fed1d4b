"""A small language model and a small ViT, for recipes that cannot download Qwen3 and AIMv2.

The language model learns from text alone. The ViT learns to name what images show, then to
caption and answer through that language model (a generative objective, as AIMv2's multimodal
one); the whole network of that run is kept too: it stands where the paper has its predecessor,
SAIL-VL-1.5, as the base that the caption judges are fine-tuned from (our choice).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from model.checkpoint import (
    build_from_recipe,
    load_language,
    load_vision,
    save_language,
    save_model,
    save_vision,
)
from model.processor import SailVLProcessor
from model.tokenizer import train_tokenizer
from sailyard.recipe import ModelShape
from sailyard.samples import read_samples
from sailyard.stage import StageContext
from training.supervised import SupervisedRun, carried
from training.tower import pretrain_tower


def run_language(ctx: StageContext) -> None:
    """Stage `bootstrap.language`: tokenizer and causal language model from pure text.

    With `model.pretrained_language` set, that checkpoint is taken instead and nothing is trained.
    """
    shape: ModelShape = ctx.section("model")
    if shape.pretrained_language:
        language, tokenizer = load_language(shape.pretrained_language)
        save_language(ctx.output("language"), language, tokenizer)
        ctx.summary(pretrained=shape.pretrained_language)
        return
    text = ctx.input("text")
    tokenizer = train_tokenizer(_texts(text), shape.language.vocab_size)
    processor = SailVLProcessor.from_recipe(shape, tokenizer)
    model = build_from_recipe(shape, tokenizer, seed=ctx.seed)
    recipe = ctx.section("bootstrap.language")
    run = SupervisedRun(ctx, model, processor, recipe, {"text": text})
    ctx.summary(**run.run(), vocab_size=len(tokenizer))
    save_language(ctx.output("language"), model.language_model, tokenizer)


def run_vision(ctx: StageContext) -> None:
    """Stage `bootstrap.vision`: the ViT, and the predecessor network that it was trained in.

    The tower first learns to name what images show (`training.tower`), unless
    `model.pretrained_vision` names one to start from.
    """
    shape: ModelShape = ctx.section("model")
    language, tokenizer = load_language(ctx.input("language"))
    processor = SailVLProcessor.from_recipe(shape, tokenizer)
    vision = load_vision(shape.pretrained_vision) if shape.pretrained_vision else None
    model = build_from_recipe(shape, tokenizer, seed=ctx.seed, vision=vision, language=language)
    reference, tower_recipe = ctx.input("reference"), ctx.section("bootstrap.tower")
    first_step = 0 if vision else tower_recipe.steps
    before = carried(ctx, first_step)
    if before is None:
        before = {}
        if vision is None:
            before["tower"] = pretrain_tower(
                ctx, model.vision_model, processor, tower_recipe, reference
            )
    run = SupervisedRun(
        ctx,
        model,
        processor,
        ctx.section("bootstrap.vision"),
        {"reference": reference},
        first_step=first_step,
        carry=before,
    )
    ctx.summary(**run.run(), **before)
    save_vision(ctx.output("vision"), model.vision_model)
    save_model(ctx.output("captioner"), model, processor)


def _texts(directory: Path) -> Iterator[str]:
    for sample in read_samples(directory):
        for message in sample.messages:
            yield message["role"]  # one token each: they stand in every turn
            yield message["content"]
