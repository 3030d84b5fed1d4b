"""The same recipe on one process and on two, whichever way the two share the state."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sailyard.artifacts import LocalStore
from sailyard.stage import Checkpoints
from tests.training.materials import make_materials
from tests.training.run_entry import context

STAGE = "post_training.base_sft_2"
SETTINGS: dict[str, Any] = {
    "max_steps": 6,
    "checkpoint_every": 2,
    "batch_size": 4,
    "micro_batch_size": 1,
    "threads": 1,
    "dtype": "float32",
    "optimizer": "adamw",
    "parallel": "zero2",
    "activation_checkpointing": "false",
}
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": "ddp"},
    "zero1": {"parallel": "zero1"},
    "zero2": {"parallel": "zero2"},
    "zero3": {"parallel": "zero3"},
    "zero2 offloaded": {"parallel": "zero2", "offload": "true"},
    "zero3 offloaded": {"parallel": "zero3", "offload": "true"},
}

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_materials(tmp_path_factory.mktemp("materials"), "micro")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_materials(tmp_path_factory.mktemp("experts"), "micro-moe")


def changes(**extra: Any) -> list[str]:
    return [f"{STAGE}.{key}={value}" for key, value in {**SETTINGS, **extra}.items()]


def inputs(materials: dict[str, Path]) -> dict[str, str]:
    """Pictures and text: two ranks often differ in modality."""
    return {"checkpoint": str(materials["model"]), "instruction": str(materials["mixed"])}


def start(
    folder: Path,
    materials: dict[str, Path],
    ranks: int,
    recipe: str = "micro",
    options: Sequence[str] = (),
    **extra: Any,
) -> subprocess.Popen[bytes]:
    module = ["-m", "tests.training.run_entry"]
    if ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        module = [*torchrun, "--shutdown-timeout=120", *module]
    command = [sys.executable, *module, *options, "--recipe", recipe, STAGE, str(folder)]
    command += [json.dumps(inputs(materials)), *changes(**extra)]
    return subprocess.Popen(command)


def losses(folder: Path) -> list[float]:
    points = json.loads((folder / "points.json").read_text(encoding="utf-8"))
    return [values["loss"] for _, values in points if "loss" in values]


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "work" / STAGE / "out" / "checkpoint" / "model.safetensors")


def assert_same(folder: Path, other: Path, tolerance: float) -> None:
    assert losses(folder) == pytest.approx(losses(other), abs=tolerance)
    assert summary(folder)["sample_order"] == summary(other)["sample_order"]
    expected = weights(other)
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=0, msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, materials: dict[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    assert start(folder, materials, ranks=1).wait() == 0
    return folder


@pytest.mark.parametrize("way", list(WAYS))
def test_two_ranks_give_the_loss_curve_of_one(
    way: str, alone: Path, materials: dict[str, Path], tmp_path: Path
) -> None:
    assert start(tmp_path, materials, ranks=2, **WAYS[way]).wait() == 0
    assert len(losses(tmp_path)) == SETTINGS["max_steps"]
    assert_same(tmp_path, alone, 1e-5)
    assert summary(tmp_path)["ranks"] == 2


@pytest.mark.parametrize("way", ["zero1", "zero2", "zero3"])
def test_bf16_keeps_float32_master_weights(
    way: str, alone: Path, materials: dict[str, Path], tmp_path: Path
) -> None:
    settings = {"dtype": "bfloat16", "trainable": '["vision","adapter"]', **WAYS[way]}
    assert start(tmp_path / "one", materials, 1, **settings).wait() == 0
    assert start(tmp_path / "two", materials, 2, **settings).wait() == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-3)
    trained, before = weights(tmp_path / "two"), load_file(materials["model"] / "model.safetensors")
    for name, tensor in trained.items():
        assert tensor.dtype == torch.float32, name
        if name.startswith("language_model"):
            assert torch.equal(tensor, before[name]), name
        elif tensor.dim() == 2:
            # The rate moves weights by less than bf16 can tell.
            assert not torch.equal(tensor, tensor.bfloat16().float()), name


def test_muon_takes_whole_matrices_on_two_ranks(materials: dict[str, Path], tmp_path: Path) -> None:
    settings = {"optimizer": "muon", "parallel": "ddp"}
    assert start(tmp_path / "one", materials, 1, **settings).wait() == 0
    assert start(tmp_path / "two", materials, 2, **settings).wait() == 0
    assert_same(tmp_path / "two", tmp_path / "one", 1e-4)


@pytest.mark.parametrize(
    "way",
    [WAYS["zero2"], WAYS["zero3"], {"parallel": "ddp", "expert_parallel": 2}],
    ids=["zero2", "zero3", "experts spread"],
)
def test_experts_train_on_two_ranks_as_on_one(
    way: dict[str, Any], experts: dict[str, Path], tmp_path: Path
) -> None:
    # Experts are balanced over what all ranks see at a time: that must be the same rows.
    whole, halves = {"micro_batch_size": 4}, {"micro_batch_size": 2}
    assert start(tmp_path / "one", experts, 1, "micro-moe", **whole).wait() == 0
    assert start(tmp_path / "two", experts, 2, "micro-moe", **halves, **way).wait() == 0
    assert_same(tmp_path / "two", tmp_path / "one", 1e-5)


@pytest.mark.parametrize("way", ["zero2", "zero3"])
def test_activation_checkpointing_changes_memory_and_nothing_else(
    way: str, alone: Path, materials: dict[str, Path], tmp_path: Path
) -> None:
    process = start(tmp_path, materials, 2, activation_checkpointing="true", **WAYS[way])
    assert process.wait() == 0
    assert_same(tmp_path, alone, 1e-5)


def test_experts_are_counted_once_when_activations_are_computed_again(
    experts: dict[str, Path], tmp_path: Path
) -> None:
    for folder, again in (("kept", "false"), ("again", "true")):
        settings = {"activation_checkpointing": again}
        assert start(tmp_path / folder, experts, 1, "micro-moe", **settings).wait() == 0
    assert_same(tmp_path / "again", tmp_path / "kept", 1e-5)
    points = [json.loads((tmp_path / f / "points.json").read_text()) for f in ("kept", "again")]
    kept, again = ([v["aux_loss"] for _, v in found if "aux_loss" in v] for found in points)
    assert again == pytest.approx(kept, abs=1e-6)


def run_stage(
    stage: str, folder: Path, paths: dict[str, Path], ranks: int, changes: list[str]
) -> dict[str, Any]:
    """The summary of another stage than `STAGE`."""
    module = ["-m", "tests.training.run_entry"]
    if ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        module = [*torchrun, *module]
    named = json.dumps({name: str(path) for name, path in paths.items()})
    subprocess.run([sys.executable, *module, stage, str(folder), named, *changes], check=True)
    return summary(folder)


@pytest.mark.slow
def test_adalrs_decides_the_same_under_zero(materials: dict[str, Path], tmp_path: Path) -> None:
    stage = "pretraining.basic"
    settings = {**SETTINGS, "max_steps": 16, "batch_size": 2, "lr": "1e-4", "schedule": "constant"}
    search = {"adalrs.window": 3, "adalrs.start": 0.1, "adalrs.end": 0.9}
    changes = [f"{stage}.{key}={value}" for key, value in {**settings, **search}.items()]
    paths = {
        "checkpoint": materials["model"],
        "language": materials["language"],
        "mix": materials["pictures"],
    }
    one, two = (run_stage(stage, tmp_path / str(n), paths, n, changes) for n in (1, 2))
    kinds = [event["what"] for event in one["adalrs"]["events"]]
    assert "slower" in kinds  # a trial that was undone: weights and optimizer came back
    assert kinds == [event["what"] for event in two["adalrs"]["events"]]
    assert one["adalrs"]["repeated_steps"] == two["adalrs"]["repeated_steps"] > 0
    assert one["sample_order"] == two["sample_order"]
    assert two["loss_last"] == pytest.approx(one["loss_last"], abs=1e-4)


@pytest.mark.slow
def test_the_bootstrap_tower_learns_the_same_on_two_ranks(
    materials: dict[str, Path], tmp_path: Path
) -> None:
    sections = ("bootstrap.adapter", "bootstrap.vision")
    settings = {**SETTINGS, "max_steps": 2, "batch_size": 2}
    changes = [f"{section}.{k}={v}" for section in sections for k, v in settings.items()]
    changes += ["bootstrap.tower.steps=4", "bootstrap.tower.checkpoint_every=2"]
    paths = {
        "language": materials["language"],
        "reference": materials["pictures"],
        "text": materials["text"],
    }
    one, two = (run_stage("bootstrap.vision", tmp_path / str(n), paths, n, changes) for n in (1, 2))
    for arm in ("tower", "adapter"):
        assert two[arm]["loss_last"] == pytest.approx(one[arm]["loss_last"], abs=1e-4), arm


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(
    first: int, then: int, alone: Path, materials: dict[str, Path], tmp_path: Path
) -> None:
    start_and_stop(tmp_path, materials, first, signal.SIGTERM)
    assert not (tmp_path / "summary.json").exists()
    assert start(tmp_path, materials, then).wait() == 0
    assert 0 < len(losses(tmp_path)) < SETTINGS["max_steps"]
    # Every remaining sample once, in the same order.
    assert summary(tmp_path)["sample_order"] == summary(alone)["sample_order"]
    expected = weights(alone)
    for name, tensor in weights(tmp_path).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "zero3"])  # zero2: tests/benchmarks/test_kills.py
def test_two_ranks_killed_again_and_again_end_with_the_same_weights(
    way: str, materials: dict[str, Path], tmp_path: Path
) -> None:
    steps: dict[str, Any] = {"max_steps": 16, **WAYS[way]}
    assert start(tmp_path / "undisturbed", materials, 2, **steps).wait() == 0
    moments = random.Random(way)
    killed = tmp_path / "killed"
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        start_and_stop(killed, materials, 2, number, moments.random() * 0.3, hold=1, **steps)
    assert start(killed, materials, 2, **steps).wait() == 0
    undisturbed = summary(tmp_path / "undisturbed")
    assert summary(killed)["sample_order"] == undisturbed["sample_order"]
    expected = weights(tmp_path / "undisturbed")
    for name, tensor in weights(killed).items():
        assert torch.equal(tensor, expected[name]), name


def start_and_stop(
    folder: Path,
    materials: dict[str, Path],
    ranks: int,
    number: signal.Signals,
    delay: float = 0.0,
    hold: int = 0,
    **extra: Any,
) -> None:
    """Signal a run once it has saved something new; SIGKILL goes to every one of its processes."""
    from sailyard.processes import descendants

    paths = {name: Path(path) for name, path in inputs(materials).items()}
    settings = changes(**extra)
    key = context(STAGE, folder, paths, settings).cache_key
    watcher = Checkpoints(LocalStore(folder / "store"), key, folder / "watcher")
    before = watcher.latest()
    process = start(folder, materials, ranks, options=("--hold", str(hold)), **extra)
    while process.poll() is None:
        latest = watcher.latest()
        if latest is not None and (before is None or latest[0] > before[0]):
            time.sleep(delay)
            if number == signal.SIGKILL:
                family = descendants(process.pid)
                for pid in [process.pid, *family]:
                    subprocess.run(["kill", "-9", str(pid)], check=False)
            else:
                process.send_signal(number)
            break
        time.sleep(0.01)
    assert process.wait() != 0, "the run ended before it could be stopped"
