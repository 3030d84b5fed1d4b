"""The loop saves beside the training, goes back when told, and ends a step that hangs."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sailyard.recipe import load_recipe
from sailyard.stage import StageContext, StopRequested, local_context
from training.checkpointing import BackgroundSaver
from training.learner import Learner
from training.loop import TrainingLoop
from training.world import join_world


def make(folder: Path, **settings: Any) -> tuple[StageContext, TrainingLoop]:
    ctx = local_context(folder, load_recipe("micro"), "bootstrap.language", {})
    torch.manual_seed(0)
    model, world = nn.Linear(3, 1), join_world()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    learner = Learner(model, optimizer, world, clip_norm=1.0)
    defaults = {"total_steps": 8, "checkpoint_every": 2}
    return ctx, TrainingLoop(ctx, learner, world, **{**defaults, **settings})


def train(loop: TrainingLoop, step: int) -> None:
    torch.manual_seed(step)
    loop.learner.backward(loop.learner.forward(True, input=torch.randn(4, 3)).sum(), True)
    loop.learner.update(0.1)


def weights(loop: TrainingLoop) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in loop.learner.model.parameters()])


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx, loop = make(tmp_path, checkpoint_every=4, total_steps=6)
    go_on, steps = threading.Event(), []
    save = ctx.checkpoints.save

    def slow(*arguments: Any) -> None:
        assert go_on.wait(120), "training waited for its checkpoint"
        save(*arguments)

    monkeypatch.setattr(ctx.checkpoints, "save", slow)

    def one_step(step: int) -> None:
        train(loop, step)
        steps.append(step)
        if step == 5:
            go_on.set()

    loop.run(one_step, dict)
    assert steps == list(range(6))
    _, other = make(tmp_path, checkpoint_every=4, total_steps=6)
    assert other.resume() is not None
    assert other.step == 4


def test_what_is_saved_is_the_state_of_its_step(tmp_path: Path) -> None:
    _, loop = make(tmp_path)
    seen: dict[int, torch.Tensor] = {}
    state: dict[str, list[int]] = {"steps": []}

    def one_step(step: int) -> None:
        train(loop, step)
        state["steps"].append(step)
        seen[step + 1] = weights(loop).clone()

    loop.run(one_step, lambda: state)
    _, other = make(tmp_path)
    resumed = other.resume()
    assert resumed is not None
    assert other.step == 6
    assert resumed[0] == {"steps": [0, 1, 2, 3, 4, 5]}
    assert torch.equal(weights(other), seen[6])


def test_a_save_that_fails_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx, loop = make(tmp_path)

    def fails(*_: object) -> None:
        raise OSError("the store is full")

    monkeypatch.setattr(ctx.checkpoints, "save", fails)
    with pytest.raises(OSError, match="the store is full"):
        loop.run(lambda step: train(loop, step), dict)


def test_a_stop_waits_for_its_checkpoint(tmp_path: Path) -> None:
    ctx, loop = make(tmp_path)

    def one_step(step: int) -> None:
        train(loop, step)
        if step == 4:
            ctx.request_stop()

    with pytest.raises(StopRequested, match="saved at step 5 of 8"):
        loop.run(one_step, dict)
    _, other = make(tmp_path)
    assert other.resume() is not None
    assert other.step == 5


def test_rolling_back_repeats_the_steps_since_the_checkpoint(tmp_path: Path) -> None:
    _, loop = make(tmp_path)
    steps: list[int] = []

    def one_step(step: int) -> None:
        steps.append(step)
        train(loop, step)
        if step == 5 and steps.count(5) == 1:
            assert loop.roll_back() is not None

    loop.run(one_step, dict)
    assert steps == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7]


def test_only_one_save_runs_at_a_time(tmp_path: Path) -> None:
    saver, running, most = BackgroundSaver(), [], []

    def save() -> None:
        running.append(1)
        most.append(len(running))
        running.pop()

    for number in range(5):
        saver.start(tmp_path / str(number), save)
    saver.wait()
    assert most == [1] * 5


HANGS = """
import sys, time
from pathlib import Path
from tests.training.test_loop import make
_, loop = make(Path(sys.argv[1]), timeout_s=0.5)
def waits_for_ever(step):
    time.sleep(600)
loop.run(waits_for_ever, dict)
"""


def test_a_step_that_hangs_tells_where_and_ends(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path)], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert "waits_for_ever" in done.stderr
