"""Two-stage pretraining (paper section 3.2): adapter alone under AdaLRS, then everything."""

from __future__ import annotations

from typing import Any

from model.checkpoint import build_from_recipe, load_language, load_model, save_model
from model.processor import SailVLProcessor
from sailyard.stage import StageContext
from training.supervised import SupervisedRun, carried, essentials


def run_basic(ctx: StageContext) -> None:
    """Stage `pretraining.basic`: a fresh adapter between the aligned ViT and a language model.

    Two arms see the same samples from the same start: a control at the fixed rate, then the
    arm that is kept, with AdaLRS. Stage-III's language model and adapter are dropped, as the
    paper does (section 3.2.1).
    """
    recipe = ctx.section("pretraining.basic")
    fixed = (carried(ctx, 0) or {}).get("fixed")
    if fixed is None:
        # Not kept: the other arm needs its memory.
        fixed = essentials(_arm(ctx, recipe, "fixed", 0, None, {}).run(final=False))
    settings = recipe.adalrs.model_dump(exclude={"enabled"}) if recipe.adalrs.enabled else None
    arm = _arm(ctx, recipe, "adalrs", fixed["steps"], settings, {"fixed": fixed})
    summary = arm.run()
    kept = {**essentials(summary), "lr_last": summary.get("lr_last", recipe.lr)}
    kept["events"] = summary.pop("adalrs_events", [])
    kept["repeated_steps"] = summary.pop("adalrs_repeated_steps", 0)
    ctx.summary(**summary, fixed=fixed, adalrs=kept)
    save_model(ctx.output("checkpoint"), arm.model, arm.processor)


def run_multitask(ctx: StageContext) -> None:
    """Stage `pretraining.multitask`: all parts, n-gram-balanced mixture, no AdaLRS."""
    model, processor = load_model(ctx.input("checkpoint"))
    recipe = ctx.section("pretraining.multitask")
    run = SupervisedRun(ctx, model, processor, recipe, {"mix": ctx.stream("mix")})
    ctx.summary(**run.run())
    save_model(ctx.output("checkpoint"), run.model, processor)


def _arm(
    ctx: StageContext,
    recipe: Any,
    arm: str,
    first_step: int,
    adalrs: dict[str, Any] | None,
    carry: dict[str, Any],
) -> SupervisedRun:
    shape = ctx.section("model")
    aligned, _ = load_model(ctx.input("checkpoint"))
    language, tokenizer = load_language(ctx.input("language"))
    processor = SailVLProcessor.from_recipe(shape, tokenizer)
    # Equal seeds: both arms draw the same fresh adapter.
    model = build_from_recipe(
        shape, tokenizer, seed=ctx.seed, vision=aligned.vision_model, language=language
    )
    return SupervisedRun(
        ctx,
        model,
        processor,
        recipe,
        {"mix": ctx.stream("mix")},
        adalrs=adalrs,
        arm=arm,
        first_step=first_step,
        carry=carry,
    )
