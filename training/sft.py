"""Supervised post-training: base SFT injections, LongCoT SFT, Think-Fusion SFT (paper 4.2)."""

from __future__ import annotations

from model.checkpoint import load_model, save_model
from sailyard.stage import StageContext
from training.averaging import write_record
from training.supervised import SupervisedRun


def run_base(ctx: StageContext) -> None:
    """Stages `post_training.base_sft_*`: one data injection each, all datasets of the stage mixed.

    The sibling of the fourth injection differs from it only in the order of the data (the seed
    is derived from the stage's name), which makes the two homogeneous for the soup.
    """
    _run(ctx, "post_training.base_sft_4" if ctx.stage_name.endswith("_sibling") else ctx.stage_name)


def run_longcot(ctx: StageContext) -> None:
    """Stage `post_training.longcot_sft`: loss on thought and answer (paper Eq. 2)."""
    _run(ctx, ctx.stage_name)


def run_think_fusion(ctx: StageContext) -> None:
    """Stage `post_training.think_fusion_sft`: the conditional loss of paper Eq. 3.

    An item that carries a thought is trained on thought and answer, a direct item on its answer
    alone; which one an item is, its target says, so the loss mask is the condition.
    """
    _run(ctx, ctx.stage_name)


def _run(ctx: StageContext, section: str) -> None:
    model, processor = load_model(ctx.input("checkpoint"))
    data = {name: ctx.stream(name) for name in ctx.input_names if name != "checkpoint"}
    recipe = ctx.section(section)
    run = SupervisedRun(ctx, model, processor, recipe, data)
    ctx.summary(**run.run())
    save_model(ctx.output("checkpoint"), run.model, processor)
    record = {
        "parent": ctx.input_digest("checkpoint"),
        "recipe": recipe.model_dump(mode="json"),
        "data": {name: ctx.input_digest(name) for name in data},
    }
    write_record(ctx.output("checkpoint"), record)
