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
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from curation.world.build import reference_samples
from curation.world.shorthand import compounds
from curation.world.text import text_samples
from model.calibration import CalibrationMeasure, ExpertCalibrator, measure_multimodal
from model.checkpoint import build_from_recipe
from model.language import language_forward
from model.modeling import SailVLForConditionalGeneration
from model.processor import SailVLProcessor
from model.tokenizer import train_tokenizer
from sailyard.recipe import ModelShape, load_recipe
from sailyard.samples import write_samples
from training.bootstrap import start_compounds
from training.packing import PackedBatch, collate_rows
from training.stream import PackedStream, open_sources
from training.supervised import Encoder

ROW = 512  # tokens
BATCH = 2  # rows, as `tiny` trains
WARMUP = 20  # steps
MEASURED = 8  # batches


def stream(dataset: Path, processor: SailVLProcessor, seed: int) -> PackedStream:
    """Packed rows of samples, without end."""
    encoder = Encoder(processor)
    return PackedStream(
        open_sources({"samples": dataset}),
        encoder,
        seq_len=ROW,
        batch_size=BATCH,
        look_ahead=48,
        seed=seed,
        decode=encoder.decode,
    )


def take(batches: PackedStream) -> PackedBatch:
    """The next batch, collated."""
    return collate_rows(batches.next_batch().rows, ROW)


def shape_of(experts: int) -> ModelShape:
    """`tiny-moe` with as many expert parameters in `experts` pieces, and no balance loss."""
    moe = load_recipe("tiny-moe").model.language.moe
    assert moe is not None  # it is what the recipe is for
    inner = moe.num_experts * moe.expert_intermediate_size // experts
    changes = {"num_experts": experts, "expert_intermediate_size": inner, "aux_loss_coef": 0.0}
    settings = [f"model.language.moe.{key}={value}" for key, value in changes.items()]
    return load_recipe("tiny-moe", settings).model


def train(
    model: SailVLForConditionalGeneration, batches: PackedStream, steps: int, lr: float
) -> None:
    """AdamW on the decoder: linear warm-up, constant, linear to zero over the last fifth."""
    parameters = list(model.language_model.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARMUP, (steps - step) / (0.2 * steps))
        batch = take(batches)
        out = language_forward(
            model.language_model,
            model.language_model.get_input_embeddings()(batch["input_ids"]),
            position_ids=batch["position_ids"],
            attention_mask=batch["segment_ids"],
            labels=batch["labels"],
        )
        assert out.loss is not None  # there are labels
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def calibrate(calibrator: ExpertCalibrator, batches: PackedStream, steps: int, lr: float) -> None:
    """Adam on the routers alone, as the stage does."""
    optimizer = torch.optim.Adam(calibrator.parameters, lr=lr)
    for _ in range(steps):
        loss, _ = calibrator.losses(*_text(take(batches)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train, measure, calibrate, measure."""
    torch.set_num_threads(1)  # the figures in the docs are of one thread
    torch.manual_seed(options.seed)
    shape = shape_of(options.experts)
    rng = np.random.default_rng(options.seed)
    texts = list(text_samples(options.texts, rng))
    shown = list(reference_samples(options.texts // 8, rng, shape.vision.image_size))
    words = compounds()
    corpus = (text for s in texts for m in s.messages for text in (m["role"], m["content"]))
    tokenizer = train_tokenizer(corpus, shape.language.vocab_size, list(words))
    processor = SailVLProcessor.from_recipe(shape, tokenizer)
    model = build_from_recipe(shape, tokenizer, seed=options.seed)
    start_compounds(model.language_model, tokenizer, words)

    write_samples(folder / "text", texts)
    write_samples(folder / "pictures", shown)
    text, seen = (stream(folder / d, processor, options.seed) for d in ("text", "pictures"))
    heldout = [_text(take(text)) for _ in range(MEASURED)]
    pictures = [take(seen) for _ in range(MEASURED)]
    train(model, text, options.steps, options.lr)

    calibrator = ExpertCalibrator(model.language_model)

    def measure() -> dict[str, dict[str, float]]:
        on_text, on_pictures = calibrator.measure(heldout), measure_multimodal(model, pictures)
        return {"text": figures(on_text), "multimodal": figures(on_pictures)}

    before = measure()
    calibrate(calibrator, text, options.calibration_steps, options.calibration_lr)
    after = measure()
    return {
        "settings": vars(options),
        "before": before,
        "after": after,
        "entropy_rise": {
            k: after[k]["router_entropy"] / before[k]["router_entropy"] - 1 for k in before
        },
        "loss_change": {k: after[k]["token_loss"] / before[k]["token_loss"] - 1 for k in before},
    }


def figures(measure: CalibrationMeasure) -> dict[str, float]:
    """Token loss in nats, and the health of the routers."""
    return {"token_loss": measure.token_loss, **measure.health.summary()}


def _text(batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    return batch["input_ids"], batch["segment_ids"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--texts", type=int, default=8000, help="samples of text")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--calibration-steps", type=int, default=40)
    parser.add_argument("--calibration-lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = run(options, Path(folder))
    if options.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    for kind, rise in result["entropy_rise"].items():
        before, after = (result[when][kind]["router_entropy"] for when in ("before", "after"))
        loss = result["loss_change"][kind]
        print(f"{kind}: entropy {before:.3f} to {after:.3f} ({rise:+.1%}), loss {loss:+.1%}")


if __name__ == "__main__":
    main()
