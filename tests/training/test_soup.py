"""The soup: an exact average in bounded memory, of checkpoints that belong together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import load_model, save_model
from model.shards import read_headers, read_tensor
from sailyard.recipe import load_recipe
from sailyard.stage import StageContext
from tests.model import tiny
from tests.training.materials import make_materials
from training.averaging import HeterogeneousSoup, average, check_homogeneous, write_record
from training.greedy import choose, token_loss, validation_samples
from training.soup import run, soup_weights
from training.supervised import Encoder

RECORD = {"parent": "p", "recipe": {"lr": 1e-5, "betas": [0.9, 0.95]}, "data": {"mix": "m"}}


def checkpoint(folder: Path, noise: int, **record: object) -> Path:
    model = tiny.network()
    generator = torch.Generator().manual_seed(noise)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    save_model(folder, model, tiny.processor())
    write_record(folder, {**RECORD, **record})
    return folder


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 3.0, "b": 1.0}])
def test_the_average_is_exact_however_it_is_cut_into_files(tmp_path, weights) -> None:
    parts = {"a": checkpoint(tmp_path / "a", 1), "b": checkpoint(tmp_path / "b", 2)}
    check_homogeneous(parts)
    whole = average(parts, weights, tmp_path / "whole")
    cut = average(parts, weights, tmp_path / "cut", shard_bytes=4096)
    assert len(list((tmp_path / "cut").glob("model-*-of-*.safetensors"))) > 2
    assert read_headers(tmp_path / "cut").keys() == read_headers(tmp_path / "a").keys()
    assert whole == cut
    a, b = (dict(load_model(path)[0].named_parameters()) for path in parts.values())
    for folder in ("whole", "cut"):
        soup, _ = load_model(tmp_path / folder)
        for name, parameter in soup.named_parameters():
            mean = (a[name] * weights["a"] + b[name] * weights["b"]) / sum(weights.values())
            assert torch.equal(parameter, mean), name
    # The heavier ingredient lies nearer.
    assert (whole["a"] < whole["b"]) == (weights["a"] > weights["b"])


def test_what_differs_is_named(tmp_path) -> None:
    a = checkpoint(tmp_path / "a", 1)
    b = checkpoint(tmp_path / "b", 2, recipe={"lr": 2e-5, "betas": [0.9, 0.95]})
    with pytest.raises(HeterogeneousSoup, match=r"recipe\.lr: 1e-05, 2e-05"):
        check_homogeneous({"a": a, "b": b})
    c = checkpoint(tmp_path / "c", 3, parent="another")
    with pytest.raises(HeterogeneousSoup, match="parent: p, another"):
        check_homogeneous({"a": a, "c": c})
    d = checkpoint(tmp_path / "d", 3)
    (d / "training.json").unlink()
    with pytest.raises(HeterogeneousSoup, match="does not say how it was trained"):
        check_homogeneous({"a": a, "d": d})
    with pytest.raises(ValueError, match="at least two"):
        check_homogeneous({"a": a})


def test_a_tensor_of_another_shape_is_refused(tmp_path) -> None:
    folders = {}
    for name, width in (("a", 4), ("b", 5)):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        save_file({"w": torch.zeros(width)}, folders[name] / "model.safetensors")
        (folders[name] / "config.json").write_text("{}")
        write_record(folders[name], RECORD)
    with pytest.raises(HeterogeneousSoup, match=r"w is \[4\] .* in a and \[5\]"):
        check_homogeneous(folders)


def test_weights_must_be_of_all_ingredients() -> None:
    assert soup_weights(["a", "b"], {}) == {"a": 1.0, "b": 1.0}
    with pytest.raises(ValueError, match="weigh all of them"):
        soup_weights(["a", "b"], {"a": 1.0})


MEASURE = """
import json, resource, sys
from pathlib import Path
from training.averaging import average
folders = {name: Path(name) for name in ("a", "b", "c")}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
average(folders, dict.fromkeys(folders, 1.0), Path("soup"), shard_bytes=32 << 20)
print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))
"""


@pytest.mark.slow
def test_memory_is_bounded_by_a_file_not_by_the_checkpoint(tmp_path) -> None:
    for number, name in enumerate("abc"):
        folder = tmp_path / name
        folder.mkdir()
        for shard in range(8):  # 256 MiB a checkpoint, in tensors of 8 MiB
            tensors = {
                f"w{shard}.{i}": torch.full((2, 1024, 1024), number + i, dtype=torch.float32)
                for i in range(4)
            }
            save_file(tensors, folder / f"model-{shard}.safetensors")
        files = {f"w{s}.{i}": f"model-{s}.safetensors" for s in range(8) for i in range(4)}
        index = json.dumps({"weight_map": files})
        (folder / "model.safetensors.index.json").write_text(index)
    root = str(Path(__file__).parents[2])
    child = subprocess.run(
        [sys.executable, "-c", MEASURE],
        cwd=tmp_path,
        env={"PYTHONPATH": root, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    # One file, its copy while it is written, and a few tensors; a network would be 256.
    assert float(child.stdout) < 130, child.stdout


def test_greedy_takes_the_best_first_and_refuses_what_makes_it_worse(tmp_path) -> None:
    """Losses are distances of a weight from its best value: known for every average."""
    parts = {}
    for name, value in (("off", 3.0), ("best", 0.5), ("other side", -1.0)):
        parts[name] = tmp_path / name
        parts[name].mkdir()
        save_file({"w": torch.full((2,), value)}, parts[name] / "model.safetensors")

    def loss(path: Path) -> float:
        headers = read_headers(path)
        return abs(float(read_tensor(headers, "w")[0]))

    found = choose(parts, dict.fromkeys(parts, 1.0), loss, tmp_path)
    assert found["taken"] == ["best", "other side"]
    assert found["refused"] == ["off"]
    assert found["ingredient_loss"] == {"off": 3.0, "best": 0.5, "other side": 1.0}
    assert [t["ingredients"] for t in found["tried"]] == [
        ["best", "other side"],
        ["best", "other side", "off"],
    ]
    assert found["loss"] == pytest.approx(0.25)
    assert not (tmp_path / "greedy").exists()


@pytest.mark.slow
def test_the_stage_makes_a_greedy_soup_and_says_what_it_refused(tmp_path: Path) -> None:
    materials = make_materials(tmp_path / "materials", "micro")
    model, processor = load_model(materials["model"])
    folders = {}
    for name, noise in (("a", 0.0), ("b", 3.0)):  # b is ruined, and so is any average with it
        folders[name] = tmp_path / name
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.language_model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
        save_model(folders[name], model, processor)
        write_record(folders[name], RECORD)
    change = ["method=greedy", "validation_per_skill=2", "threads=1"]
    recipe = load_recipe("micro", [f"post_training.soup.{setting}" for setting in change])
    inputs = {**folders, "heldout": materials["pictures"]}
    ctx = StageContext.local_context(tmp_path / "run", recipe, "post_training.soup", inputs)
    run(ctx)
    greedy = ctx.summary_values["greedy"]
    assert greedy["taken"] == ["a"]
    assert greedy["refused"] == ["b"]
    assert set(ctx.summary_values["ingredient_digests"]) == {"a", "b"}
    assert set(ctx.summary_values["weights"]) == {"a"}
    # The packed rows give the loss that the samples give one by one.
    samples = validation_samples(materials["pictures"], 2)
    alone = [(token_loss(folders["a"], [s]), s) for s in samples]
    encoder = Encoder(processor)
    labels = [int(encoder(s).loss_mask[1:].sum()) for s in samples]
    mean = sum(loss * n for (loss, _), n in zip(alone, labels, strict=True)) / sum(labels)
    assert greedy["loss"] == pytest.approx(mean, rel=1e-5)
    soup = load_file(ctx.output("checkpoint") / "model.safetensors")
    for name, tensor in load_file(folders["a"] / "model.safetensors").items():
        assert torch.equal(soup[name], tensor), name
