"""Three-stage SAIL-ViT alignment (paper section 2.1.1): adapter, then ViT too, then everything."""

from __future__ import annotations

from typing import Any

import numpy as np

from evaluation.alignment import alignment_distances
from model.checkpoint import build_from_recipe, load_language, load_model, load_vision, save_model
from model.processor import SailVLProcessor
from sailyard.media import decode_image
from sailyard.samples import SampleReader
from sailyard.stage import StageContext
from training.supervised import SupervisedRun
from training.world import join_world

# The view whose figures stand for the stage: what the language model reads, every token scaled as
# its first RMSNorm scales it. Unscaled, a fresh adapter is "near" only because it is small.
HEADLINE = "adapter_unit"
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
    run = SupervisedRun(ctx, model, processor, recipe, {"mix": ctx.stream("mix")})
    summary = run.run()
    after = measure(ctx, run.model, processor)
    ctx.summary(
        **summary,
        **{f"{name}_before": before[HEADLINE][name] for name in DISTANCES},
        **{f"{name}_after": after[HEADLINE][name] for name in DISTANCES},
        distances_before=before,
        distances_after=after,
    )
    save_model(ctx.output("checkpoint"), run.model, processor)


def measure(ctx: StageContext, model: Any, processor: Any) -> dict[str, Any]:
    """Distances of Table 7, in every view, on held-out images spread over the skills."""
    metrics = ctx.section("alignment.metrics")
    reader = SampleReader(ctx.stream("heldout"))
    spread = np.linspace(0, len(reader) - 1, min(metrics.num_images, len(reader))).astype(int)
    images = [decode_image(reader[i].images[0]) for i in spread.tolist()]
    home, device = model.device, join_world().device
    parts = (model.vision_model, model.mlp1)  # of the decoder only the embedding table is read
    try:
        for part in parts:
            part.to(device)
        return alignment_distances(
            model,
            processor,
            images,
            num_text_rows=metrics.num_text_rows,
            seed=0,
            projections=metrics.projections,
        )
    finally:
        for part in parts:
            part.to(home)
