"""What reading, decoding, tokenising and packing cost, beside the training that they feed.

`tiny`'s multi-task stage on pictures and text of the small world, in shards so small that there are
several blocks. Local folder and S3 server (on this machine, every shard fetched anew each time)
take turns, and what counts is the median of the ratios of one turn:

- `alone`: the stream without a model, nothing overlapping;
- `training`: the stage itself, and `data_wait`, the share of its time that it waits for a batch.

`decoding` says what a rank has to do for a row that is not its own (text and image headers) and
for one that is (its pixels, too), for photographs of 640 x 480 and the released tiles.

    python -m benchmarks.data --json
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.kills import settings_of
from model.checkpoint import load_model
from model.processor import SailVLProcessor
from sailyard.recipe import load_recipe
from sailyard.samples import Sample, read_samples, write_samples
from sailyard.settings import Settings
from sailyard.stage import MemoryRecorder, StageContext, local_context
from tests.training.materials import make_materials
from training.supervised import Encoder, SupervisedRun

STAGE = "pretraining.multitask"
SHARD_SIZE = 200


def prepared(folder: Path, num_samples: int) -> dict[str, Path]:
    """An untrained network, and a dataset of four pictures to one text."""
    made = make_materials(folder, "tiny", num_samples // 5, num_samples * 4 // 5)
    mixed = list(read_samples(made["mixed"]))
    order = np.random.default_rng(0).permutation(len(mixed))
    write_samples(folder / "mix", (mixed[i] for i in order), shard_size=SHARD_SIZE)
    return {"checkpoint": made["model"], "mix": folder / "mix"}


def opened(
    folder: Path, inputs: dict[str, Path], settings: Settings, steps: int
) -> tuple[StageContext, SupervisedRun]:
    """The stage on a store, its data published there and nothing of it in a cache."""
    recipe = load_recipe("tiny", [f"{STAGE}.max_steps={steps}"])
    ctx = local_context(folder, recipe, STAGE, inputs, settings)
    model, processor = load_model(ctx.input("checkpoint"))
    data = {"mix": ctx.stream("mix")}
    return ctx, SupervisedRun(ctx, model, processor, ctx.section(STAGE), data)


def speed_alone(run: SupervisedRun, batches: int) -> float:
    """Tokens per second of the stream by itself."""
    started, tokens = time.perf_counter(), 0
    for _ in range(batches):
        tokens += sum(len(e.input_ids) for row in run.stream.next_batch().rows for e in row)
    seconds = time.perf_counter() - started
    run.batches.close()
    return tokens / seconds


def speed_training(ctx: StageContext, run: SupervisedRun) -> dict[str, float]:
    """Tokens per second of the stage, and the share of the time that it waits for data."""
    run.run()
    assert isinstance(ctx.recorder, MemoryRecorder)
    points = [values for _, values in ctx.recorder.points if "data_wait" in values]
    names = ("tokens_per_second", "data_wait")
    # The first window starts workers and caches.
    return {name: statistics.median(p[name] for p in points[1:]) for name in names}


def measure(num_samples: int, batches: int, steps: int, repeats: int) -> dict[str, Any]:
    """Both stores in turns."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = prepared(folder / "materials", num_samples)
        with (
            settings_of("local", folder) as local,
            settings_of("s3", folder) as s3,
        ):
            for turn in range(repeats):
                row: dict[str, Any] = {}
                for store, settings in (("local", local), ("s3", s3)):
                    place = f"{store}-{turn}"
                    alone = opened(folder / place / "a", inputs, settings(f"{place}-a"), steps)[1]
                    row[f"alone_{store}"] = speed_alone(alone, batches)
                    ctx, run = opened(folder / place / "t", inputs, settings(f"{place}-t"), steps)
                    row[f"training_{store}"] = speed_training(ctx, run)
                rows.append(row)
    return {
        "alone_tokens_per_second": _median(row["alone_local"] for row in rows),
        "alone_s3_over_local": _median(row["alone_s3"] / row["alone_local"] for row in rows),
        "alone_over_training": _median(
            row["alone_local"] / row["training_local"]["tokens_per_second"] for row in rows
        ),
        "training_s3_over_local": _median(
            row["training_s3"]["tokens_per_second"] / row["training_local"]["tokens_per_second"]
            for row in rows
        ),
        "data_wait_local": _median(row["training_local"]["data_wait"] for row in rows),
        "data_wait_s3": _median(row["training_s3"]["data_wait"] for row in rows),
        "turns": rows,
    }


def decoding(tokenizer: Any, num_images: int) -> dict[str, float]:
    """Milliseconds of one question about one photograph."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    messages = [
        {"role": "user", "content": "<image>\nWhat is there, and where does it stand?"},
        {"role": "assistant", "content": "Something colourful, all over the place. " * 4},
    ]
    sample = Sample("photo", "benchmark", "photo", messages, [buffer.getvalue()])
    encoder = Encoder(SailVLProcessor(tokenizer))
    planned = encoder(sample)

    def milliseconds(work: Callable[[], Any]) -> float:
        started = time.perf_counter()
        for _ in range(num_images):
            work()
        return (time.perf_counter() - started) / num_images * 1000

    plan = milliseconds(lambda: encoder(sample))
    decode = milliseconds(lambda: encoder.decode(sample, replace(planned)))
    ranks = 64
    return {
        "plan_ms": plan,
        "decode_ms": decode,
        "ms_per_own_sample_of_64_ranks": ranks * plan + decode,
        "ms_if_each_decoded_all": ranks * (plan + decode),
    }


def _median(values: Iterable[float]) -> float:
    return float(statistics.median(values))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--batches", type=int, default=150)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    result = measure(args.samples, args.batches, args.steps, args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_model(make_materials(Path(folder), "tiny", 40, 5)["model"])[1].tokenizer
        result["decoding"] = decoding(tokenizer, 40)
    if args.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    print(
        f"data alone: {result['alone_tokens_per_second']:.0f} tokens/s, "
        f"{result['alone_over_training']:.1f} times what training takes; S3 "
        f"{result['alone_s3_over_local']:.0%} of local; waiting for data "
        f"{result['data_wait_local']:.1%} (local), {result['data_wait_s3']:.1%} (S3)"
    )


if __name__ == "__main__":
    main()
