"""Stage `pretraining.expert_calibration`: routers of an MoE decoder learn to use every expert.

Only routers train, on text alone (paper section 2.2). Entropy and token loss are reported before
and after, on text that was held out and on samples with pictures, which calibration never sees.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from model.calibration import CalibrationMeasure, ExpertCalibrator, measure_multimodal
from model.checkpoint import load_language, load_model, save_language
from model.processor import SailVLProcessor
from sailyard.stage import StageContext
from training.guard import Diverged
from training.learner import Learner
from training.loop import TrainingLoop
from training.packing import PackedBatch, collate_rows, on_device
from training.stream import PackedStream, open_sources
from training.supervised import Encoder
from training.world import World, join_world

NUM_MEASURED = 4  # held-out batches


def run(ctx: StageContext) -> None:
    """Calibrate, with entropy and token loss before and after."""
    recipe = ctx.section("pretraining.expert_calibration")
    torch.set_num_threads(recipe.threads)
    language, tokenizer = load_language(ctx.input("language"))
    processor = SailVLProcessor.from_recipe(ctx.section("model"), tokenizer)
    stream = PackedStream(
        open_sources({"text": ctx.stream("text")}),
        Encoder(processor),
        seq_len=recipe.seq_len,
        batch_size=recipe.batch_size,
        look_ahead=4 * recipe.batch_size,
        seed=ctx.seed,
    )
    world = join_world()
    # An aligned model whose decoder has not been trained since: tower and adapter speak to it.
    whole, whole_processor = load_model(ctx.input("checkpoint"))
    whole.language_model = language
    whole.to(world.device)
    calibrator = ExpertCalibrator(language)
    heldout = [_tensors(stream, world) for _ in range(NUM_MEASURED)]
    pictures = [on_device(batch, world.device) for batch in _pictures(ctx, recipe, whole_processor)]
    before, before_pictures = calibrator.measure(heldout), measure_multimodal(whole, pictures)
    optimizer = torch.optim.Adam(calibrator.parameters, lr=recipe.lr)
    learner = Learner(language, optimizer, world, clip_norm=math.inf, dtype=recipe.dtype)
    loop = TrainingLoop(
        ctx,
        learner,
        world,
        total_steps=recipe.steps,
        checkpoint_every=max(recipe.steps // 4, 1),
    )
    resumed = loop.resume()
    if resumed is not None:
        stream.load(resumed[0]["stream"])

    def one_step(step: int) -> None:
        with learner.precision():
            loss, result = calibrator.losses(*_tensors(stream, world))
        learner.backward(loss, last=True)
        norm = learner.update(recipe.lr)
        if not math.isfinite(norm):
            raise Diverged(f"step {step}: gradient norm {norm:g} of the routers; lower lr")
        entropy = result.health.summary()["router_entropy"]
        ctx.metric(step, token_loss=result.token_loss, balance=result.balance, entropy=entropy)
        ctx.progress(step + 1, recipe.steps, f"entropy {entropy:.3f}")

    loop.run(one_step, lambda: {"stream": stream.state()})
    stream.close()
    after, after_pictures = calibrator.measure(heldout), measure_multimodal(whole, pictures)
    ctx.summary(
        before=_figures(before),
        after=_figures(after),
        multimodal_before=_figures(before_pictures),
        multimodal_after=_figures(after_pictures),
        steps=recipe.steps,
    )
    save_language(ctx.output("language"), language, tokenizer)


def _tensors(stream: PackedStream, world: World) -> tuple[torch.Tensor, torch.Tensor]:
    batch = on_device(collate_rows(stream.next_batch().rows, stream.seq_len), world.device)
    return batch["input_ids"], batch["segment_ids"]


def _pictures(ctx: StageContext, recipe: Any, processor: SailVLProcessor) -> list[PackedBatch]:
    encoder = Encoder(processor)
    stream = PackedStream(
        open_sources({"multimodal": ctx.stream("multimodal")}),
        encoder,
        seq_len=recipe.seq_len,
        batch_size=recipe.batch_size,
        look_ahead=4 * recipe.batch_size,
        seed=ctx.seed,
        decode=encoder.decode,
    )
    batches = [stream.next_batch() for _ in range(NUM_MEASURED)]
    stream.close()
    return [collate_rows(batch.rows, stream.seq_len) for batch in batches]


def _figures(measure: CalibrationMeasure) -> dict[str, float]:
    return {"token_loss": measure.token_loss, **measure.health.summary()}
