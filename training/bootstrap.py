"""A small language model and a small ViT, for recipes that cannot download Qwen3 and AIMv2.

The language model learns from text alone. The ViT learns to name what images show, then to
caption and answer through that language model (a generative objective, as AIMv2's multimodal
one); the whole network of that run is kept too: it stands where the paper has its predecessor,
SAIL-VL-1.5, as the base that the caption judges are fine-tuned from (our choice).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model.checkpoint import (
    build_from_recipe,
    load_language,
    load_vision,
    save_language,
    save_model,
    save_vision,
)
from model.modeling import SailVLForConditionalGeneration
from model.processor import SailVLProcessor
from model.tokenizer import train_tokenizer
from sailyard.recipe import ModelShape, TrainRecipe
from sailyard.samples import COMPOUNDS_FILE, OpenFile, read_samples
from sailyard.stage import StageContext
from training.supervised import SupervisedRun, carried, essentials
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
    text = ctx.stream("text")
    compounds = _compounds(text)
    tokenizer = train_tokenizer(_texts(text), shape.language.vocab_size, list(compounds))
    processor = SailVLProcessor.from_recipe(shape, tokenizer)
    model = build_from_recipe(shape, tokenizer, seed=ctx.seed)
    start_compounds(model.language_model, tokenizer, compounds)
    recipe = ctx.section("bootstrap.language")
    run = SupervisedRun(ctx, model, processor, recipe, {"text": text})
    ctx.summary(**run.run(), vocab_size=len(tokenizer))
    save_language(ctx.output("language"), run.model.language_model, tokenizer)


def run_vision(ctx: StageContext) -> None:
    """Stage `bootstrap.vision`: the ViT, and the predecessor network that it was trained in.

    The tower first learns to name what images show (`training.tower`), unless
    `model.pretrained_vision` names one to start from. Then the adapter learns to say it in words
    that the frozen language model understands, and only then everything is trained, with text
    among the pictures: what the language model alone can do, chains of thought above all, is soon
    lost without (docs/log.md).
    """
    shape: ModelShape = ctx.section("model")
    language, tokenizer = load_language(ctx.input("language"))
    processor = SailVLProcessor.from_recipe(shape, tokenizer)
    vision = load_vision(shape.pretrained_vision) if shape.pretrained_vision else None
    model = build_from_recipe(shape, tokenizer, seed=ctx.seed, vision=vision, language=language)
    reference, tower_recipe = ctx.stream("reference"), ctx.section("bootstrap.tower")
    torch.set_num_threads(ctx.section("bootstrap.vision").threads)
    first_step = 0 if vision else tower_recipe.steps
    before = carried(ctx, first_step)
    if before is None:
        before = {}
        if vision is None:
            before["tower"] = pretrain_tower(
                ctx, model.vision_model, processor, tower_recipe, reference
            )

    def arm(
        name: str,
        model: SailVLForConditionalGeneration,
        recipe: TrainRecipe,
        inputs: Mapping[str, OpenFile],
        first_step: int,
    ) -> SupervisedRun:
        return SupervisedRun(
            ctx, model, processor, recipe, inputs, arm=name, first_step=first_step, carry=before
        )

    pictures = {"reference": reference}
    if "adapter" not in before:
        adapter = arm("adapter", model, ctx.section("bootstrap.adapter"), pictures, first_step)
        before["adapter"] = essentials(adapter.run(final=False, everywhere=True))
        model = adapter.model
        del adapter  # with its optimizer
    everything = arm(
        "main",
        model,
        ctx.section("bootstrap.vision"),
        {**pictures, "text": ctx.stream("text")},
        first_step + before["adapter"]["steps"],
    )
    ctx.summary(**everything.run(), **before)
    save_vision(ctx.output("vision"), everything.model.vision_model)
    save_model(ctx.output("captioner"), everything.model, processor)


@torch.no_grad()
def start_compounds(
    language: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    compounds: Mapping[str, Sequence[str]],
) -> None:
    """Start a compound word's embedding as the sum of its parts', at the length of a word's.

    What "topleftredcircle" says is then there from the first step, as it is in a visual token;
    from random vectors looking up colours in such words was not learnt (docs/log.md).
    """
    table = language.get_input_embeddings().weight
    for word, parts in compounds.items():
        pieces = [tokenizer.encode(f" {part}", add_special_tokens=False) for part in parts]
        vectors = [table[ids].sum(dim=0) / len(ids) ** 0.5 for ids in pieces]
        table[tokenizer.convert_tokens_to_ids(word)] = sum(vectors) / len(vectors) ** 0.5


def _compounds(text: OpenFile) -> dict[str, list[str]]:
    """Words that stand for several others, with those, where a text dataset has such words."""
    try:
        with text(COMPOUNDS_FILE) as file:
            found: dict[str, list[str]] = json.load(file)
    except FileNotFoundError:
        return {}
    return found


def _texts(text: OpenFile) -> Iterator[str]:
    for sample in read_samples(text):
        for message in sample.messages:
            yield message["role"]  # one token each: they stand in every turn
            yield message["content"]
