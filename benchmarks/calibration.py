"""Expert calibration on a tiny decoder whose routers were trained without a balance loss.

The decoder of `tiny-moe`, its experts cut into `experts` smaller ones of the same total size,
learns from the small world's text with nothing to spread its routing (AdamW; loss on answers only,
as in the language bootstrap). Then the routers alone are calibrated on text. Before and after:
entropy, load and token loss on text that was held out, and on samples with pictures, which
calibration never sees and which reach the decoder through a tower and an adapter that nobody has
trained.

    python -m benchmarks.calibration --json
    python -m benchmarks.calibration --json --experts 8     # tiny-moe's own experts
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from curation.world.build import reference_samples
from curation.world.shorthand import compounds
from curation.world.text import text_samples
from model.calibration import CalibrationMeasure, ExpertCalibrator, measure_multimodal
from model.checkpoint import build_from_recipe
from model.modeling import SailVLForConditionalGeneration
from model.processor import SailVLProcessor
from model.tokenizer import train_tokenizer
from sailyard.recipe import ModelShape, load_recipe
from sailyard.samples import Sample
from training.bootstrap import start_compounds
from training.packing import PackedBatch, collate_rows
from training.stream import PackedStream, Source
from training.supervised import encoder

ROW = 512  # tokens
BATCH = 2  # rows, as `tiny` trains
WARMUP = 20  # steps
MEASURED = 8  # batches


class Batches:
    """Packed batches of samples, without end."""

    def __init__(self, samples: list[Sample], processor: SailVLProcessor, seed: int) -> None:
        source = Source("samples", samples, 1.0, np.zeros(len(samples), dtype=bool))
        self.stream = PackedStream(
            [source], encoder(processor), seq_len=ROW, batch_size=BATCH, look_ahead=48, seed=seed
        )

    def take(self) -> PackedBatch:
        return collate_rows(self.stream.next_batch().rows, ROW)


def shape_of(experts: int) -> ModelShape:
    """`tiny-moe` with as many expert parameters in `experts` pieces, and no balance loss."""
    moe = load_recipe("tiny-moe").model.language.moe
    assert moe is not None  # it is what the recipe is for
    inner = moe.num_experts * moe.expert_intermediate_size // experts
    changes = {"num_experts": experts, "expert_intermediate_size": inner, "aux_loss_coef": 0.0}
    settings = [f"model.language.moe.{key}={value}" for key, value in changes.items()]
    return load_recipe("tiny-moe", settings).model


def train(model: SailVLForConditionalGeneration, batches: Batches, steps: int, lr: float) -> None:
    """AdamW on the decoder: linear warm-up, constant, linear to zero over the last fifth."""
    parameters = list(model.language_model.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARMUP, (steps - step) / (0.2 * steps))
        batch = batches.take()
        out = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=batch["segment_ids"],
            labels=batch["labels"],
        )
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train, measure, calibrate, measure."""
    shape = shape_of(options.experts)
    texts = list(text_samples(options.texts, np.random.default_rng(options.seed)))
    size = shape.vision.image_size
    shown = list(
        reference_samples(options.texts // 8, np.random.default_rng(options.seed + 1), size)
    )
    words = compounds()
    corpus = (text for s in texts for m in s.messages for text in (m["role"], m["content"]))
    tokenizer = train_tokenizer(corpus, shape.language.vocab_size, list(words))
    processor = SailVLProcessor.from_recipe(shape, tokenizer)
    model = build_from_recipe(shape, tokenizer, seed=options.seed)
    start_compounds(model.language_model, tokenizer, words)

    text = Batches(texts, processor, options.seed)
    heldout = [(b["input_ids"], b["segment_ids"]) for b in (text.take() for _ in range(MEASURED))]
    seen = Batches(shown, processor, options.seed)
    pictures = [seen.take() for _ in range(MEASURED)]
    train(model, text, options.steps, options.lr)

    calibrator = ExpertCalibrator(model.language_model, options.calibration_lr)

    def measure() -> dict[str, dict[str, float]]:
        on_text, on_pictures = calibrator.measure(heldout), measure_multimodal(model, pictures)
        return {"text": figures(on_text), "multimodal": figures(on_pictures)}

    before = measure()
    for _ in range(options.calibration_steps):
        batch = text.take()
        calibrator.step(batch["input_ids"], batch["segment_ids"])
    after = measure()
    rises = {k: after[k]["router_entropy"] / before[k]["router_entropy"] - 1 for k in before}
    return {"settings": vars(options), "before": before, "after": after, "entropy_rise": rises}


def figures(measure: CalibrationMeasure) -> dict[str, float]:
    """Token loss in nats, and the health of the routers."""
    return {"token_loss": measure.token_loss, **measure.health.summary()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--texts", type=int, default=8000, help="samples of text")
    parser.add_argument("--steps", type=int, default=150, help="of training")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--calibration-steps", type=int, default=40)
    parser.add_argument("--calibration-lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    result = run(options)
    result["seconds"] = time.perf_counter() - started
    if options.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    for where, rise in result["entropy_rise"].items():
        before, after = result["before"][where], result["after"][where]
        print(
            f"{where}: entropy {before['router_entropy']:.3f} to {after['router_entropy']:.3f} "
            f"({rise:+.1%}), token loss {before['token_loss']:.2f} to {after['token_loss']:.2f}"
        )


if __name__ == "__main__":
    main()
