"""How long training stands still for a checkpoint: in the background, and when it waits for it.

A model of a recipe's decoder with AdamW's state is saved to a local store or to an S3 server that
runs on this machine, again and again. "blocking" is the time until a checkpoint exists when
nothing is done beside it; "pause" is what the training loop waits for when the rest happens behind
its back. Both take turns; what counts is the median of the ratios of one turn.

    python -m benchmarks.checkpoints --json
    python -m benchmarks.checkpoints --json --store s3
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sailyard.artifacts import LocalStore, ObjectStore, open_store
from sailyard.stage import Checkpoints, Rank
from tests.s3 import running_s3
from training.checkpointing import BackgroundSaver, write_state
from training.learner import Learner
from training.world import World


def trained(num_params: int) -> Learner:
    """A learner whose optimizer has its state."""
    width = 1024
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(num_params // width**2)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    learner = Learner(model, optimizer, World(Rank(), torch.device("cpu")), clip_norm=1.0)
    learner.backward(learner.forward(True, input=torch.randn(2, width)).sum(), last=True)
    learner.update(1e-3)
    return learner


def measure(learner: Learner, checkpoints: Checkpoints, folder: Path, repeats: int) -> Any:
    """Seconds of both ways, and the share."""
    saver, rank = BackgroundSaver(), Rank()
    step = 0

    def save(directory: Path, tensors: dict[str, torch.Tensor], at: int) -> None:
        write_state(directory, rank, tensors, {})
        checkpoints.save(at, directory, rank)

    rows = []
    copy: dict[str, torch.Tensor] = {}
    for _ in range(repeats):
        step += 1
        started = time.perf_counter()
        copy = learner.tensors(into=copy)
        save(folder / str(step), copy, step)
        blocking = time.perf_counter() - started
        step += 1
        started = time.perf_counter()
        copy = learner.tensors(into=copy)
        saver.start(folder / str(step), partial(save, folder / str(step), copy, step))
        pause = time.perf_counter() - started
        saver.wait()
        rows.append((blocking, pause))
    return {
        "blocking_s": statistics.median(row[0] for row in rows),
        "pause_s": statistics.median(row[1] for row in rows),
        "pause_share": statistics.median(row[1] / row[0] for row in rows),
    }


@contextmanager
def opened(kind: str, folder: Path) -> Iterator[ObjectStore]:
    """A store in `folder`, or in an S3 server that ends with the block."""
    if kind == "local":
        yield LocalStore(folder / "store")
        return
    (folder / "s3").mkdir()
    with running_s3(folder / "s3") as server:
        yield open_store(server.settings(folder, "checkpoints"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description=__doc__)
    parser.add_argument("--store", default="local", choices=["local", "s3"])
    parser.add_argument("--params", type=int, default=50_000_000, help="three tensors of each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name, opened(args.store, Path(name)) as store:
        folder = Path(name)
        learner = trained(args.params)
        megabytes = sum(t.numel() * t.element_size() for t in learner.tensors().values()) / 1e6
        checkpoints = Checkpoints(store, "benchmark", folder / "resume")
        result = {
            "store": args.store,
            "megabytes": round(megabytes),
            **measure(learner, checkpoints, folder, args.repeats),
        }
    if args.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    print(
        f"{result['megabytes']} MB, {args.store}: blocking {result['blocking_s']:.2f} s, pause "
        f"{result['pause_s']:.3f} s ({result['pause_share']:.1%})"
    )


if __name__ == "__main__":
    main()
