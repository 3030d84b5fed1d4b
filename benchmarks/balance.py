"""Visual balance on simulated ranks: `python -m benchmarks.balance --json`.

The same stream, seed and AnyRes mix, packed with and without balance, one row of 8,192 tokens per
rank and step. A step lasts as long as its dearest rank works; work is the forward FLOPs of the
recipe's network, weights and attention of both parts (the backward is twice that for either).
No GPU is involved: this is what the balance can give where time follows FLOPs. The first steps,
in which the buffer is still as drawn, count as well.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.mix import INSTRUCTION, MULTITASK, Kind, Length, describe, draw
from model.config import SailVLConfig, language_config_of, vision_config_of
from model.counting import empty_model
from model.processor import Encoded
from sailyard.plan.flops import Cost, FlopModel
from sailyard.recipe import load_recipe
from sailyard.samples import Sample
from training.balance import Balance, flop_model
from training.stream import PackedStream, Source

SEQ_LEN = 8192
LOOK_AHEAD = 32  # samples per row of a step
MIXES = {"multitask": MULTITASK, "instruction": INSTRUCTION}


class LengthsOnly:
    """A dataset of which only the lengths are known; a sample's id is its number."""

    def __init__(self, lengths: Sequence[Length]) -> None:
        self.lengths = lengths
        self.rows = [len(lengths)]

    def __getitem__(self, index: int) -> Sample:
        return Sample(id=str(index), source="mix", task="mix", messages=[], images=[])

    def prepare(self, shards: Sequence[int]) -> None:
        """Nothing: there are no shards."""

    def close(self) -> None:
        """Nothing."""

    def encode(self, sample: Sample) -> Encoded:
        """As many tokens as the sample has; the first one is its number."""
        ids = np.zeros(self.lengths[int(sample.id)].tokens, dtype=np.int64)
        ids[0] = int(sample.id)
        return Encoded(ids, np.ones(len(ids), dtype=bool), np.zeros((0, 3, 1, 1), np.float32))

    def patches(self, encoded: Encoded) -> tuple[int, ...]:
        """Patches of each image of an encoded sample."""
        return self.lengths[int(encoded.input_ids[0])].patches


def measure(
    kinds: Sequence[Kind], num_ranks: int, num_steps: int, flops: FlopModel
) -> dict[str, Any]:
    """Both streams over the same samples; ratios are means over the steps."""
    num_samples = num_ranks * (num_steps * 10 + LOOK_AHEAD)
    lengths = draw(kinds, num_samples, any_resolution=True)
    without = _stream(lengths, num_ranks, num_steps, flops, balanced=False)
    with_it = _stream(lengths, num_ranks, num_steps, flops, balanced=True)
    return {
        "ranks": num_ranks,
        "steps": num_steps,
        "without": without,
        "with": with_it,
        "step_time_ratio": without["time_per_token"] / with_it["time_per_token"],
    }


def _stream(
    lengths: Sequence[Length], num_ranks: int, num_steps: int, flops: FlopModel, *, balanced: bool
) -> dict[str, Any]:
    data = LengthsOnly(lengths)

    def cost_of(encoded: Encoded) -> Cost:
        return flops.cost(len(encoded.input_ids), data.patches(encoded))

    stream = PackedStream(
        [Source("mix", data, 1.0)],
        data.encode,
        seq_len=SEQ_LEN,
        batch_size=num_ranks,
        look_ahead=LOOK_AHEAD * num_ranks,
        seed=0,
        balance=Balance(num_ranks, cost_of) if balanced else None,
    )
    stream.epoch_steps(1)  # fills the buffer once, so that planning alone is timed
    loads, tokens, seconds = [], 0, 0.0
    for _ in range(num_steps):
        started = time.perf_counter()
        batch = stream.next_batch()
        seconds += time.perf_counter() - started
        costs = [sum((cost_of(e) for e in row), Cost(0.0, 0.0)) for row in batch.rows]
        loads.append([(c.vision, c.language, c.total) for c in costs])
        tokens += sum(len(e.input_ids) for row in batch.rows for e in row)
    load = np.array(loads)  # [steps, ranks, 3]
    ratio = load.max(axis=1) / load.mean(axis=1)
    return {
        "max_over_mean": float(ratio[:, 2].mean()),
        "max_over_mean_worst_step": float(ratio[:, 2].max()),
        "vision_max_over_mean": float(ratio[:, 0].mean()),
        "language_max_over_mean": float(ratio[:, 1].mean()),
        "fill": stream.stats.summary()["packing_fill"],
        "time_per_token": float(load[:, :, 2].max(axis=1).sum() / tokens),
        "stream_seconds_per_step": seconds / num_steps,
    }


def main() -> None:
    """Run all mixes and rank counts; print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="2b-anyres", help="network whose FLOPs are counted")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    shape = load_recipe(arguments.recipe).model
    config = SailVLConfig(
        vision_config=vision_config_of(shape.vision).to_dict(),
        text_config=language_config_of(shape.language).to_dict(),
        downsample=shape.downsample,
    )
    flops = flop_model(empty_model(config))
    found: dict[str, Any] = {"recipe": arguments.recipe, "seq_len": SEQ_LEN, "mixes": {}}
    for name, kinds in MIXES.items():
        runs = [measure(kinds, ranks, arguments.steps, flops) for ranks in (8, 64)]
        mix = describe(draw(kinds, 8192, any_resolution=True))
        found["mixes"][name] = {"mix": mix, "runs": runs}
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{arguments.recipe}, rows of {SEQ_LEN}, max/mean cost per step")
    print("mix          ranks  without   with  step time  vision  language  fill")
    for name, result in found["mixes"].items():
        for run in result["runs"]:
            before, after = run["without"], run["with"]
            print(
                f"{name:12} {run['ranks']:5} {before['max_over_mean']:8.3f} "
                f"{after['max_over_mean']:6.3f} {run['step_time_ratio']:9.2f}x "
                f"{after['vision_max_over_mean']:7.3f} {after['language_max_over_mean']:9.3f} "
                f"{after['fill']:5.3f}"
            )


if __name__ == "__main__":
    main()
