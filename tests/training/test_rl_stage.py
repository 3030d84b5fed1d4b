"""The reinforcement stages, run by hand: what they report, and that a kill changes nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.chat import THINKING_SUFFIX
from sailyard.recipe import Recipe, load_recipe
from sailyard.samples import Sample
from sailyard.stage import MemoryRecorder, StageContext, StopRequested
from tests.training.rl_toy import save_guessing_policy, write_prompts
from training.rl.losses import GSPO_CLIP
from training.rl.rewards import RewardError
from training.rl.rollouts import PromptSet, to_prompt
from training.rl.stage import run_mixed, run_verifiable

ENTRIES = {"post_training.verifiable_rl": run_verifiable, "post_training.mixed_rl": run_mixed}
SETTINGS = {
    "steps": 6,
    "prompts_per_step": 4,
    "rollouts_per_prompt": 4,
    "max_new_tokens": 6,
    "updates_per_step": 2,
    "checkpoint_every": 2,
    "seq_len": 256,
    "lr": "3e-3",
    "threads": 1,
    "dtype": "float32",
}


def toy_recipe(stage: str, **changes: object) -> Recipe:
    settings = {**SETTINGS, **changes}
    return load_recipe("micro", [f"{stage}.{key}={value}" for key, value in settings.items()])


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("guessing")
    save_guessing_policy(directory, steps=60)
    return directory


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("prompts")
    write_prompts(directory, 48, num_thinking=8)
    return directory


def context(
    folder: Path, stage: str, checkpoint: Path, prompts: Path, **changes: object
) -> StageContext:
    inputs = {"checkpoint": checkpoint, "prompts": prompts}
    return StageContext.local_context(folder, toy_recipe(stage, **changes), stage, inputs)


def weights(ctx: StageContext) -> dict[str, torch.Tensor]:
    return load_file(ctx.output("checkpoint") / "model.safetensors")


@pytest.mark.parametrize("stage", list(ENTRIES))
def test_stage_reports_what_it_did(
    tmp_path: Path, stage: str, checkpoint: Path, prompts: Path
) -> None:
    ctx = context(tmp_path, stage, checkpoint, prompts)
    ENTRIES[stage](ctx)
    summary = ctx.summary_values
    for key in ("reward_first", "reward_last", "heldout_reward_before", "heldout_reward_after"):
        assert 0.0 <= summary[key] <= 1.0
    assert summary["algorithm"] == "dapo"
    assert summary["num_heldout_prompts"] + summary["num_prompts"] == 48
    before, after = summary["part_digests_before"], summary["part_digests_after"]
    assert before["language"] != after["language"]
    recorder = ctx.recorder
    assert isinstance(recorder, MemoryRecorder)
    for name in ("reward", "accuracy", "format_rate", "entropy", "response_length", "kept_groups"):
        assert len(recorder.series(name)) == SETTINGS["steps"], name
    assert recorder.series("clip_fraction")
    record = json.loads((ctx.output("checkpoint") / "training.json").read_text())
    assert record["parent"] == ctx.input_digest("checkpoint")


def test_resumed_run_equals_the_undisturbed_one(
    tmp_path: Path, checkpoint: Path, prompts: Path
) -> None:
    """Stopped twice, at a checkpoint and between two, the final weights are the same bits."""
    stage = "post_training.mixed_rl"
    whole = context(tmp_path / "whole", stage, checkpoint, prompts)
    run_mixed(whole)
    for stop_at in (1, 4, None):
        ctx = context(tmp_path / "broken", stage, checkpoint, prompts)
        if stop_at is None:
            run_mixed(ctx)
            break
        _die_at(ctx, stop_at)
        with pytest.raises(_Killed):
            run_mixed(ctx)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(ctx)[name]), name
    skip = {"seconds_per_step"}
    for key in whole.summary_values.keys() - skip:
        assert ctx.summary_values[key] == whole.summary_values[key], key


class _Killed(BaseException):
    """Stands for the process ending without a chance to save."""


def _die_at(ctx: StageContext, step: int) -> None:
    report = ctx.metric

    def metric(at: int, **values: float) -> None:
        report(at, **values)
        if at >= step:
            raise _Killed

    ctx.metric = metric  # type: ignore[method-assign]


def test_a_stop_request_saves_first(tmp_path: Path, checkpoint: Path, prompts: Path) -> None:
    stage = "post_training.verifiable_rl"
    ctx = context(tmp_path, stage, checkpoint, prompts, checkpoint_every=100)
    ctx.request_stop()
    with pytest.raises(StopRequested, match="step 1 of 6"):
        run_verifiable(ctx)
    latest = ctx.checkpoints.latest()
    assert latest is not None
    assert latest[0] == 1


SCRIPT = """
import sys, time
from pathlib import Path
from tests.training.test_rl_stage import context
from training.rl.stage import run_verifiable
folder, checkpoint, prompts = map(Path, sys.argv[1:4])
ctx = context(folder, "post_training.verifiable_rl", checkpoint, prompts)
report = ctx.metric
def metric(step, **values):
    report(step, **values)
    print("step", step, flush=True)
    if sys.argv[4] == f"step {step}":
        time.sleep(600)  # however late it is killed, it still runs
ctx.metric = metric
run_verifiable(ctx)
print("done", flush=True)
"""


@pytest.mark.slow
def test_sigkill_at_any_step_changes_nothing(
    tmp_path: Path, checkpoint: Path, prompts: Path
) -> None:
    """A real process, killed with SIGKILL before and after its first checkpoint."""
    stage = "post_training.verifiable_rl"
    whole = context(tmp_path / "whole", stage, checkpoint, prompts)
    run_verifiable(whole)
    folder = tmp_path / "killed"
    arguments = [sys.executable, "-c", SCRIPT, str(folder), str(checkpoint), str(prompts)]
    for last in ("step 0", "step 3", "done"):
        process = subprocess.Popen([*arguments, last], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == last:
                break
        if last != "done":
            process.send_signal(signal.SIGKILL)
        process.stdout.close()
        assert process.wait() == (0 if last == "done" else -signal.SIGKILL)
    ctx = context(folder, stage, checkpoint, prompts)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(ctx)[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("moe", [False, True])
def test_reward_rises_on_a_toy_task(tmp_path: Path, moe: bool) -> None:
    """From guessing among four colours towards knowing which one belongs to which thing."""
    save_guessing_policy(tmp_path / "policy", moe=moe)
    write_prompts(tmp_path / "prompts", 64)
    stage = "post_training.verifiable_rl"
    ctx = context(
        tmp_path / "run",
        stage,
        tmp_path / "policy",
        tmp_path / "prompts",
        steps=45,
        prompts_per_step=16,
        rollouts_per_prompt=5,
        checkpoint_every=50,
        lr="1e-3",
        algorithm="auto",
        **({"clip_low": GSPO_CLIP.low, "clip_high": GSPO_CLIP.high} if moe else {}),
    )
    run_verifiable(ctx)
    summary = ctx.summary_values
    assert summary["algorithm"] == ("gspo" if moe else "dapo")
    assert summary["reward_last"] > summary["reward_first"] + 0.1
    assert summary["heldout_reward_after"] > summary["heldout_reward_before"] + 0.2


def test_prompts_are_a_function_of_seed_and_position(prompts: Path) -> None:
    first, second = PromptSet(prompts, 7), PromptSet(prompts, 7)
    assert [p.id for p in first.draw(3, 60)] == [p.id for p in second.draw(3, 60)]
    heldout = {p.id for p in first.heldout()}
    epoch = [p.id for p in first.draw(0, first.num_training)]
    assert len(set(epoch)) == first.num_training  # each once per epoch
    assert not heldout & set(epoch)
    assert len(heldout) == 10  # a fifth of 48
    assert {p.id for p in PromptSet(prompts, 8).heldout()} != heldout


def test_prompt_asks_for_thought_once_and_hides_the_answer() -> None:
    sample = Sample(
        id="a",
        source="text",
        task="sum",
        messages=[
            {"role": "user", "content": "What is 1 + 2?"},
            {"role": "assistant", "content": "3"},
        ],
        meta={"answer": 3, "check": "number", "think": True},
    )
    prompt = to_prompt(sample)
    assert prompt.messages == [{"role": "user", "content": f"What is 1 + 2?\n{THINKING_SUFFIX}"}]
    assert prompt.answer == "3"
    sample.messages[0]["content"] = prompt.messages[0]["content"]
    assert to_prompt(sample).messages == prompt.messages


def test_too_few_prompts_are_refused(tmp_path: Path) -> None:
    write_prompts(tmp_path / "few", 2)
    with pytest.raises(RewardError, match="holds 2 prompts"):
        PromptSet(tmp_path / "few", 0)
