"""Reinforcement on two processes: prompts are dealt, and the run is that of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.rl_toy import save_guessing_policy, write_prompts

STAGE = "post_training.verifiable_rl"
SETTINGS: dict[str, Any] = {
    "steps": 4,
    "prompts_per_step": 5,  # three for the one rank, two for the other
    "rollouts_per_prompt": 4,
    "max_new_tokens": 6,
    "updates_per_step": 2,
    "checkpoint_every": 2,
    "seq_len": 64,  # several micro-batches an update, and not as many on each rank
    "micro_batch_size": 1,
    "lr": "3e-3",
    "threads": 1,
    "dtype": "float32",
    "activation_checkpointing": "false",
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("policy")
    save_guessing_policy(folder / "checkpoint", steps=60)
    write_prompts(folder / "prompts", 48, num_thinking=8)
    return {name: str(folder / name) for name in ("checkpoint", "prompts")}


def run(folder: Path, inputs: dict[str, str], ranks: int, **extra: Any) -> dict[str, Any]:
    """The series of every metric, and the summary."""
    module = ["-m", "tests.training.run_entry"]
    if ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        module = [*torchrun, *module]
    changes = [f"{STAGE}.{key}={value}" for key, value in {**SETTINGS, **extra}.items()]
    command = [sys.executable, *module, STAGE, str(folder), json.dumps(inputs), *changes]
    subprocess.run(command, check=True)
    points = json.loads((folder / "points.json").read_text(encoding="utf-8"))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {"steps": [values for _, values in points], "summary": summary}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    found = run(folder, inputs, 1)
    assert max(step["updates"] for step in found["steps"]) == 2
    (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    return folder


@pytest.mark.parametrize("way", ["ddp", "zero2"])
def test_two_ranks_learn_what_one_learns(
    way: str, alone: Path, inputs: dict[str, str], tmp_path: Path
) -> None:
    expected = json.loads((alone / "found.json").read_text(encoding="utf-8"))
    found = run(tmp_path, inputs, 2, parallel=way)
    assert found["summary"]["ranks"] == 2
    assert len(found["steps"]) == SETTINGS["steps"]
    for mine, theirs in zip(found["steps"], expected["steps"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    for key in ("heldout_reward_before", "heldout_reward_after", "num_heldout_prompts"):
        assert found["summary"][key] == pytest.approx(expected["summary"][key]), key
    checkpoint = Path("work") / STAGE / "out" / "checkpoint" / "model.safetensors"
    weights = load_file(alone / checkpoint)
    for name, tensor in load_file(tmp_path / checkpoint).items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-4, rtol=0, msg=name)
