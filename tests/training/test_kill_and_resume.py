"""A supervised stage killed at random moments ends with the weights of an undisturbed one."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sailyard.artifacts import LocalStore
from sailyard.stage import Checkpoints
from tests.training.materials import make_materials
from tests.training.run_entry import context

# A start is held before the eighth step after what it resumed: a slow save is known of when the
# next begins, after four, and up to three more are let go. So three starts find enough to do.
STEPS = {"max_steps": 20, "checkpoint_every": 2, "batch_size": 2, "micro_batch_size": 2}
COMMON = {**STEPS, "threads": 1}


def changes(section: str, **extra: object) -> list[str]:
    return [f"{section}.{key}={value}" for key, value in {**COMMON, **extra}.items()]


STAGES = {
    "bootstrap.language": changes("bootstrap.language"),
    "bootstrap.vision": [
        *changes("bootstrap.vision", max_steps=10),
        "bootstrap.tower.steps=6",
        "bootstrap.tower.checkpoint_every=2",
    ],
    "pretraining.basic": changes(
        "pretraining.basic",
        **{"max_steps": 12, "adalrs.window": 3, "adalrs.start": 0.1, "adalrs.end": 0.9},
    ),
    "post_training.base_sft_2": changes("post_training.base_sft_2"),
}


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_materials(tmp_path_factory.mktemp("materials"), "micro")


def inputs_of(stage: str, materials: dict[str, Path]) -> dict[str, str]:
    wanted = {
        "bootstrap.language": {"text": "text"},
        "bootstrap.vision": {"language": "language", "reference": "pictures", "text": "text"},
        "pretraining.basic": {"checkpoint": "model", "language": "language", "mix": "pictures"},
        "post_training.base_sft_2": {"checkpoint": "model", "instruction": "pictures"},
    }[stage]
    return {name: str(materials[material]) for name, material in wanted.items()}


def start(
    stage: str, folder: Path, inputs: dict[str, str], *options: str
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.training.run_entry", *options, stage, str(folder)]
    return subprocess.Popen([*command, json.dumps(inputs), *STAGES[stage]])


def outcome(folder: Path) -> tuple[dict[str, str], dict[str, object]]:
    """Digests of every output file, and the summary without its timings."""
    out = next((folder / "work").iterdir()) / "out"
    digests = {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    summary.pop("tokens_per_second")
    return digests, summary


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(STAGES))
def test_killed_three_times_ends_with_the_same_weights(
    stage: str, materials: dict[str, Path], tmp_path: Path
) -> None:
    inputs = inputs_of(stage, materials)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert start(stage, undisturbed, inputs).wait() == 0
    paths = {name: Path(path) for name, path in inputs.items()}
    # A folder of its own: in the stage's, one would delete what the other has just downloaded.
    key = context(stage, killed, paths, STAGES[stage]).cache_key
    watcher = Checkpoints(LocalStore(killed / "store"), key, tmp_path / "watcher")
    moments = random.Random(stage)
    for _ in range(3):
        before = watcher.latest()
        process = start(stage, killed, inputs, "--hold", str(moments.randrange(4)))
        while process.poll() is None:
            latest = watcher.latest()
            if latest is not None and (before is None or latest[0] > before[0]):
                time.sleep(moments.random() * 0.4)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        assert process.wait() == -signal.SIGKILL, "the stage ended before it could be killed"
    assert start(stage, killed, inputs).wait() == 0
    assert outcome(killed) == outcome(undisturbed)
