"""AdaLRS from a rate eight times too low, against fixed rates, over several seeds.

A micro network learns from nothing to describe pictures and to continue text: the supervised run
that every stage uses, all parts learning. A sweep finds the best fixed rate by its mean final loss;
then, for each seed, the same run starts at an eighth of it, once fixed and once under AdaLRS. The
final loss is the mean over the last tenth of the steps.

    python -m benchmarks.adalrs --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.checkpoint import load_model
from sailyard.recipe import TrainRecipe, load_recipe
from sailyard.stage import local_context
from tests.training.materials import make_materials
from training.supervised import SupervisedRun

TOO_LOW = 8
STAGE = "post_training.base_sft_2"
SEARCH = {"window": 10, "start": 0.05, "end": 0.4}


def final_loss(
    materials: Mapping[str, Path], recipe: TrainRecipe, seed: int, search: bool
) -> tuple[float, float]:
    """Loss over the last tenth of one run, and the last learning rate."""
    with tempfile.TemporaryDirectory() as folder:
        ctx = local_context(Path(folder), load_recipe("micro"), STAGE, {})
        model, processor = load_model(materials["model"])
        run = SupervisedRun(
            ctx,
            model,
            processor,
            recipe,
            {"mixed": materials["mixed"]},
            seed=seed,
            adalrs=SEARCH if search else None,
        )
        summary = run.run()
    return summary["loss_last"], summary.get("lr_last", recipe.lr)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adalrs", description=__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sweep-seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    settings: dict[str, Any] = {
        "seq_len": 256,
        "batch_size": 4,
        "micro_batch_size": 4,
        "look_ahead": 32,
        "max_steps": args.steps,
        "checkpoint_every": 10_000,
        "schedule": "constant",
        "threads": 1,
        "dtype": "float32",
    }

    def runs(
        materials: Mapping[str, Path], lr: float, search: bool, seeds: int
    ) -> list[tuple[float, float]]:
        recipe = TrainRecipe.model_validate({**settings, "lr": lr})
        return [final_loss(materials, recipe, seed, search) for seed in range(seeds)]

    with tempfile.TemporaryDirectory() as folder:
        materials = make_materials(Path(folder), "micro", num_texts=2000, num_pictures=1500)
        sweep = {
            lr: [loss for loss, _ in runs(materials, lr, False, args.sweep_seeds)]
            for lr in args.rates
        }
        best = min(sweep, key=lambda lr: statistics.mean(sweep[lr]))
        reference = [loss for loss, _ in runs(materials, best, False, args.seeds)]
        fixed = [loss for loss, _ in runs(materials, best / TOO_LOW, False, args.seeds)]
        found = runs(materials, best / TOO_LOW, True, args.seeds)
    adaptive = [loss for loss, _ in found]
    result = {
        "sweep": {f"{lr:g}": statistics.mean(losses) for lr, losses in sweep.items()},
        "best_rate": best,
        "start_rate": best / TOO_LOW,
        "best": reference,
        "fixed": fixed,
        "adalrs": adaptive,
        "adalrs_last_rate": [rate for _, rate in found],
        "seeds_where_adalrs_is_lower": sum(a < f for a, f in zip(adaptive, fixed, strict=True)),
        "adalrs_over_best": statistics.mean(adaptive) / statistics.mean(reference),
        "fixed_over_best": statistics.mean(fixed) / statistics.mean(reference),
    }
    if args.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    for name, value in result.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
