"""A small language model and a small ViT, for recipes that cannot download Qwen3 and AIMv2.

The language model learns from text alone. The ViT then learns by captioning and answering
through that language model (a generative objective, as AIMv2's multimodal one); the whole
network of that run is kept too: it stands where the paper has its predecessor, SAIL-VL-1.5,
as the base that the caption judges are fine-tuned from (our choice).
"""

from __future__ import annotations

import torch

from model.checkpoint import (
    build_model,
    load_language,
    load_vision,
    save_language,
    save_model,
    save_vision,
)
from model.processor import SailVLProcessor
from model.tokenizer import load_tokenizer, train_tokenizer
from sailyard.recipe import ModelRecipe
from sailyard.samples import read_samples
from sailyard.stage import StageContext
from training.supervised import SupervisedRun


def make_processor(tokenizer, recipe: ModelRecipe) -> SailVLProcessor:
    """The processor of a recipe's image geometry and chat settings."""
    return SailVLProcessor(
        tokenizer,
        image_size=recipe.vision.image_size,
        patch_size=recipe.vision.patch_size,
        downsample=recipe.downsample,
        max_tiles=recipe.max_tiles,
        use_thumbnail=recipe.use_thumbnail,
        system_message=recipe.system_message,
    )


def run_language(ctx: StageContext) -> None:
    """Stage `bootstrap.language`: tokenizer and causal language model from pure text.

    With `model.pretrained_language` set, that checkpoint is taken instead and nothing is trained.
    """
    recipe: ModelRecipe = ctx.section("model")
    torch.manual_seed(ctx.seed)
    if recipe.pretrained_language:
        tokenizer = load_tokenizer(recipe.pretrained_language)
        model = build_model(recipe, tokenizer, language=load_language(recipe.pretrained_language))
        ctx.summary(pretrained=recipe.pretrained_language)
    else:
        text = ctx.input("text")
        tokenizer = train_tokenizer(_texts(text), recipe.language.vocab_size)
        model = build_model(recipe, tokenizer)
        run = SupervisedRun(
            ctx,
            model,
            make_processor(tokenizer, recipe),
            ctx.section("bootstrap.language"),
            {"text": text},
        )
        ctx.summary(**run.run(), vocab_size=len(tokenizer))
    save_language(ctx.output("language"), model.language_model, tokenizer)


def run_vision(ctx: StageContext) -> None:
    """Stage `bootstrap.vision`: the ViT, and the predecessor network that it was trained in."""
    recipe: ModelRecipe = ctx.section("model")
    torch.manual_seed(ctx.seed)
    language = ctx.input("language")
    tokenizer = load_tokenizer(language)
    vision = load_vision(recipe.pretrained_vision) if recipe.pretrained_vision else None
    model = build_model(recipe, tokenizer, language=load_language(language), vision=vision)
    processor = make_processor(tokenizer, recipe)
    run = SupervisedRun(
        ctx,
        model,
        processor,
        ctx.section("bootstrap.vision"),
        {"reference": ctx.input("reference")},
    )
    ctx.summary(**run.run())
    save_vision(ctx.output("vision"), model.vision_model)
    save_model(ctx.output("captioner"), model, processor)


def _texts(directory):
    for sample in read_samples(directory):
        for message in sample.messages:
            yield message["content"]
