"""A training run that is killed again and again ends as one that was left alone.

A packed, mixed, multimodal run of `micro` (text and pictures from datasets of several blocks, rows
balanced by cost, a checkpoint every other step) trains once undisturbed and once ended at random
moments: SIGKILL for all of its processes, or SIGTERM as before an eviction. Its data and its
checkpoints lie in a folder, or in an S3 server that runs on this machine. What counts: the weights
bit for bit, and the chained hash of the ids of all samples in their order.

    python -m benchmarks.kills --store s3 --ranks 2 --kills 20 --json

Exits with 1 if anything differs, or if the run reached its end before all kills. Processes are
forked from one that has imported everything, or most of the time would go into imports; the tests
of several ranks go through torchrun.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from operators.processes import free_ports
from sailyard.artifacts import open_store
from sailyard.samples import read_samples, write_samples
from sailyard.settings import Settings
from sailyard.stage import EXIT_RESUME
from tests.s3 import running_s3
from tests.training import run_entry
from tests.training.materials import make_materials

STAGE = "post_training.base_sft_4"
SETTINGS = {
    "checkpoint_every": 2,
    "batch_size": 4,
    "micro_batch_size": 1,
    "look_ahead": 64,
    "visual_balance": "true",
    "weights": '{"instruction":2,"video":1}',
    "threads": 1,
    "dtype": "float32",
    "parallel": "zero2",
    "optimizer": "adamw",
    "activation_checkpointing": "false",
}
SHARD_SIZE = 6  # samples, so that these small datasets have several blocks of shards all the same
SHARE_OF_SIGKILL = 0.7
LONGEST_WAIT_S = 0.6  # about three steps, or in the midst of starting

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["training.sft", "training.zero", "tests.training.run_entry"])


def prepared(folder: Path) -> dict[str, Path]:
    """The stage's inputs: a network, pictures, and text in the place of the videos."""
    made = make_materials(folder, "micro", num_texts=60, num_pictures=60)
    for name in ("pictures", "text"):
        write_samples(folder / f"{name}-sharded", read_samples(made[name]), shard_size=SHARD_SIZE)
    return {
        "checkpoint": made["model"],
        "instruction": folder / "pictures-sharded",
        "video": folder / "text-sharded",
    }


def run_rank(log: Path, environment: Mapping[str, str], arguments: Sequence[str]) -> None:
    """One rank, in a process of its own."""
    with log.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    os.environ.update(environment)
    run_entry.main(arguments)


class Trial:
    """One run in a folder, started as often as it takes to end."""

    def __init__(
        self, folder: Path, inputs: Mapping[str, Path], ranks: int, steps: int, settings: Settings
    ) -> None:
        folder.mkdir(parents=True)
        self.folder, self.ranks, self.settings = folder, ranks, settings
        paths = json.dumps({name: str(path) for name, path in inputs.items()})
        changes = [f"{STAGE}.{k}={v}" for k, v in {**SETTINGS, "max_steps": steps}.items()]
        self.arguments = [STAGE, str(folder), paths, *changes]

    def start(self) -> list[ForkServerProcess]:
        """The run's processes, from its newest checkpoint on."""
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
        processes = []
        for rank in range(self.ranks):
            environment = self.settings.environment() | {"DS_ACCELERATOR": "cpu"}
            if self.ranks > 1:
                numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks}
                environment |= place | {name: str(number) for name, number in numbers.items()}
            arguments = (self.folder / "log", environment, self.arguments)
            processes.append(FORKS.Process(target=run_rank, args=arguments))
        for process in processes:
            process.start()
        return processes

    def finish(self) -> None:
        """Run to the end; RuntimeError with the log's end if that fails."""
        if any(ended(self.start())):
            tail = (self.folder / "log").read_text(errors="replace")[-3000:]
            raise RuntimeError(f"the run did not end well:\n{tail}")

    def newest(self) -> str:
        """Name of the newest checkpoint's pointer, "" before there is one."""
        keys = open_store(self.settings).list("checkpoints/")
        return max((key for key in keys if key.count("/") == 2), default="")

    def outcome(self) -> dict[str, Any]:
        """Digest of the trained weights, and the order of the samples."""
        weights = self.folder / "work" / STAGE / "out" / "checkpoint" / "model.safetensors"
        summary = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
        return {
            "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "sample_order": summary["sample_order"],
            "samples": summary["samples"],
        }


def ended(processes: Sequence[ForkServerProcess]) -> list[int]:
    """Exit codes, once all have ended."""
    for process in processes:
        process.join()
    return [process.exitcode or 0 for process in processes]


def disturbed(trial: Trial, kills: int, moments: random.Random) -> dict[str, int]:
    """End the run `kills` times, then let it finish; how often with which signal, how it ended.

    Fewer times if it reaches its end before: all that could be disturbed has been.
    """
    counts = {"SIGKILL": 0, "SIGTERM": 0, "saved_on_request": 0}
    while counts["SIGKILL"] + counts["SIGTERM"] < kills:
        processes = trial.start()
        _wait_for_checkpoints(trial, processes, moments.choice([0, 1, 1, 2]))
        time.sleep(moments.uniform(0.0, LONGEST_WAIT_S))
        number = signal.SIGKILL if moments.random() < SHARE_OF_SIGKILL else signal.SIGTERM
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid or 0, number)
        codes = ended(processes)
        if not any(codes):
            return counts
        counts[number.name] += 1
        counts["saved_on_request"] += codes[0] == EXIT_RESUME
    trial.finish()
    return counts


def _wait_for_checkpoints(
    trial: Trial, processes: Sequence[ForkServerProcess], number: int
) -> None:
    """Return when so many new ones exist, or the run has ended."""
    newest = trial.newest()
    while number and all(process.is_alive() for process in processes):
        time.sleep(0.05)
        found = trial.newest()
        number, newest = number - (found != newest), found


@contextmanager
def settings_of(store: str, folder: Path) -> Iterator[Callable[[str], Settings]]:
    """A function from a name to settings of a yard of that name on the store."""
    if store == "local":
        yield lambda name: Settings(home=folder / name, store=f"file://{folder / name / 'store'}")
        return
    (folder / "s3").mkdir()
    with running_s3(folder / "s3") as server:
        yield lambda name: server.settings(folder / name, name)


def measure(store: str, ranks: int, kills: int, steps: int, seed: int) -> dict[str, Any]:
    """Both runs and what they came to."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = prepared(folder / "materials")
        with settings_of(store, folder) as settings:
            alone = Trial(folder / "alone", inputs, ranks, steps, settings("alone"))
            started = time.monotonic()
            alone.finish()
            seconds = time.monotonic() - started
            killed = Trial(folder / "killed", inputs, ranks, steps, settings("killed"))
            counts = disturbed(killed, kills, random.Random(f"{seed}:{store}:{ranks}"))
            expected, found = alone.outcome(), killed.outcome()
    return {
        "store": store,
        "ranks": ranks,
        "steps": steps,
        "seconds_undisturbed": round(seconds, 1),
        **counts,
        "samples": expected["samples"],
        "same_weights": found["weights"] == expected["weights"],
        "same_samples": found["sample_order"] == expected["sample_order"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--store", default="local", choices=["local", "s3"])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    result = measure(args.store, args.ranks, args.kills, args.steps, args.seed)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print("  ".join(f"{key} {value}" for key, value in result.items()))
    if result["SIGKILL"] + result["SIGTERM"] < args.kills:
        sys.exit("the run reached its end before all kills: give it more --steps")
    sys.exit(0 if result["same_weights"] and result["same_samples"] else 1)


if __name__ == "__main__":
    main()
