"""Three-stage SAIL-ViT alignment (paper section 2.1.1): adapter, then ViT too, then everything."""

from __future__ import annotations

from itertools import islice
from typing import Any

from evaluation.alignment import alignment_distances
from model.checkpoint import build_from_recipe, load_language, load_model, load_vision, save_model
from model.processor import SailVLProcessor
from sailyard.media import decode_image
from sailyard.samples import read_samples
from sailyard.stage import StageContext
from training.supervised import SupervisedRun

HEADLINE = "adapter"  # the view whose figures stand for the stage: what the LM reads, as it is
DISTANCES = ("nearest_neighbour", "wasserstein", "mean_distance")


def run(ctx: StageContext) -> None:
    """Stages `alignment.*`: train the declared parts, measure both distances before and after.

    The first stage assembles ViT, a fresh adapter and the language model; the later ones go on
    from the checkpoint before.
    """
    recipe = ctx.section(ctx.stage_name)
    if ctx.stage_name == "alignment.warmup":
        shape = ctx.section("model")
        language, tokenizer = load_language(ctx.input("language"))
        processor = SailVLProcessor.from_recipe(shape, tokenizer)
        vision = load_vision(ctx.input("vision"))
        model = build_from_recipe(shape, tokenizer, seed=ctx.seed, vision=vision, language=language)
    else:
        model, processor = load_model(ctx.input("checkpoint"))
    before = measure(ctx, model, processor)
    run = SupervisedRun(ctx, model, processor, recipe, {"mix": ctx.input("mix")})
    summary = run.run()
    after = measure(ctx, model, processor)
    ctx.summary(
        **summary,
        **{f"{name}_before": before[HEADLINE][name] for name in DISTANCES},
        **{f"{name}_after": after[HEADLINE][name] for name in DISTANCES},
        distances_before=before,
        distances_after=after,
    )
    save_model(ctx.output("checkpoint"), model, processor)


def measure(ctx: StageContext, model: Any, processor: Any) -> dict[str, Any]:
    """Distances of Table 7, in every view, on the first images of the stage's mixture."""
    metrics = ctx.section("alignment.metrics")
    with_images = (s for s in read_samples(ctx.input("mix")) if s.images and not s.is_video)
    images = [decode_image(s.images[0]) for s in islice(with_images, metrics.num_images)]
    return alignment_distances(
        model,
        processor,
        images,
        num_text_rows=metrics.num_text_rows,
        seed=0,
        projections=metrics.projections,
    )
