"""A whole training step of a recipe's network: tokens per second and MFU on dense packed rows.

Rows are full of samples of one image and text each, as the engine packs them; the weights are
random, which costs the same. FLOPs are counted from the network (forward and twice that for
backward, attention included, recomputation not), and MFU is their rate over the accelerator's
dense bf16 peak. `--layers` keeps that many decoder layers where memory does not hold all, and the
output says so.

    python -m benchmarks.step --recipe 2b --seq-len 8192 16384 --json      # one GPU
    python -m benchmarks.step --recipe micro --seq-len 512 --json          # try it on a CPU
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from model.checkpoint import build_model
from model.config import language_config_of, vision_config_of
from model.modeling import SailVLForConditionalGeneration
from model.processor import Encoded
from sailyard.plan.flops import Cost
from sailyard.recipe import TrainRecipe, load_recipe
from training.balance import sample_cost
from training.engine import Engine
from training.meter import peak_flops

IMAGE_TOKEN = 5


def network(recipe: str, layers: int | None) -> SailVLForConditionalGeneration:
    """Random weights in the shape of a recipe, with fewer decoder layers if asked."""
    shape = load_recipe(recipe).model
    if layers is not None:
        shape = shape.model_copy(
            update={"language": shape.language.model_copy(update={"num_layers": layers})}
        )
    return build_model(
        vision_config_of(shape.vision),
        language_config_of(shape.language, None),
        image_token_id=IMAGE_TOKEN,
        downsample=shape.downsample,
    )


def full_row(
    model: SailVLForConditionalGeneration, seq_len: int, sample_len: int, seed: int
) -> list[Encoded]:
    """Samples of `sample_len` tokens, one tile each, that fill a row to its end."""
    rng = np.random.default_rng(seed)
    config = model.config
    visual, side = config.tokens_per_tile, config.vision_config.image_size
    row = []
    for start in range(0, seq_len, sample_len):
        length = min(sample_len, seq_len - start)
        ids = rng.integers(IMAGE_TOKEN + 1, config.text_config.vocab_size, length)
        has_image = length > visual + 8
        if has_image:
            ids[4 : 4 + visual] = IMAGE_TOKEN
        mask = np.zeros(length, dtype=bool)
        mask[4 + visual * has_image :] = True
        pixels = rng.standard_normal((int(has_image), 3, side, side), dtype=np.float32)
        row.append(Encoded(ids.astype(np.int64), mask, pixels))
    return row


def measure(
    model: SailVLForConditionalGeneration,
    seq_len: int,
    sample_len: int,
    repeats: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Median step time at one row length, after two steps to warm up."""
    recipe = TrainRecipe.model_validate({"seq_len": seq_len, "batch_size": 1, **settings})
    engine = Engine(model, recipe)
    row = full_row(model, seq_len, sample_len, seed=0)
    cost_of = sample_cost(model)
    cost = sum((cost_of(encoded) for encoded in row), Cost(0.0, 0.0))
    device = engine.world.device
    seconds = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        result = engine.step([row], [[0] * len(row)], 1e-5)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        assert result.finite
    median = statistics.median(seconds[2:])
    flops = 3 * cost.total
    figures: dict[str, Any] = {
        "seq_len": seq_len,
        "step_s": median,
        "tokens_per_second": seq_len / median,
        "tflops_per_second": flops / median / 1e12,
        "vision_share_of_flops": cost.vision / cost.total,
    }
    if device.type == "cuda":
        figures["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        peak = peak_flops(torch.cuda.get_device_name())
        figures["mfu"] = None if peak is None else flops / median / peak
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--recipe", default="2b")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--sample-len", type=int, default=1024, help="tokens of a sample")
    parser.add_argument("--layers", type=int, help="decoder layers to keep; all by default")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model = network(args.recipe, args.layers)
    on_gpu = torch.cuda.is_available()
    settings = {
        "dtype": "bfloat16" if on_gpu else "float32",
        "activation_checkpointing": args.checkpointing,
    }
    result = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "recipe": args.recipe,
        "decoder_layers": model.config.text_config.num_hidden_layers,
        "all_layers": args.layers is None,
        **settings,
        "rows": [
            measure(model, seq_len, args.sample_len, args.repeats, settings)
            for seq_len in args.seq_len
        ],
    }
    if args.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    for row in result["rows"]:
        mfu = f"  MFU {row['mfu']:.1%}" if row.get("mfu") else ""
        print(f"{row['seq_len']:6} tokens: {row['tokens_per_second']:10.0f} tokens/s{mfu}")


if __name__ == "__main__":
    main()
