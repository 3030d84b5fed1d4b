"""The supervised loop that every non-RL training stage runs: resumable, bit for bit."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from model.modeling import SailVLForConditionalGeneration, part_digests
from model.processor import Encoded, SailVLProcessor
from sailyard.media import decode_image
from sailyard.recipe import TrainRecipe
from sailyard.samples import Sample
from sailyard.stage import StageContext, StopRequested
from training.balance import Balance, sample_cost
from training.checkpointing import STATE_FILE, load_state, restore, save_state, snapshot
from training.engine import Engine
from training.packing import truncated
from training.schedules import AdaLRS, lr_factor
from training.stream import PackedStream, open_sources

TRIAL_FILE = "trial.safetensors"


def encoder(processor: SailVLProcessor) -> Callable[[Sample], Encoded]:
    """How a stored sample becomes token ids, loss mask and tiles."""

    def encode(sample: Sample) -> Encoded:
        images = [decode_image(data) for data in sample.images]
        return processor.encode(sample.messages, images, is_video=sample.is_video)

    return encode


def truncation(
    processor: SailVLProcessor, recipe: TrainRecipe
) -> Callable[[Encoded], Encoded | None] | None:
    """How samples longer than a row are cut, if the recipe wants them cut."""
    if recipe.too_long == "quarantine":
        return None
    return partial(truncated, seq_len=recipe.seq_len, image_token_id=processor.image_token_id)


def world_size() -> int:
    """Ranks that share a step."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def carried(ctx: StageContext, first_step: int) -> dict[str, Any] | None:
    """What the arms before `first_step` measured, if the newest checkpoint is past them."""
    latest = ctx.checkpoints.resume_point
    if latest is None or latest[0] <= first_step:
        return None
    state = json.loads((latest[1] / STATE_FILE).read_text(encoding="utf-8"))
    carry: dict[str, Any] = state["carry"]
    return carry


def essentials(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What later arms carry of an arm's summary: the same however often it was cut off."""
    return {key: summary[key] for key in ("loss_first", "loss_last", "steps", "tokens")}


@dataclass(slots=True)
class _Progress:
    """What a run remembers besides weights, optimizer and stream."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    tokens: int = 0


class SupervisedRun:
    """One pass of supervised training of a model on a mixture.

    `arm` names the run inside its stage: a stage that trains twice (AdaLRS beside its control)
    gives each arm its own checkpoints through `first_step`, the number its steps count from, and
    `carry`, what the arms before it measured.
    """

    def __init__(
        self,
        ctx: StageContext,
        model: SailVLForConditionalGeneration,
        processor: SailVLProcessor,
        recipe: TrainRecipe,
        inputs: Mapping[str, Path],
        *,
        seed: int | None = None,
        adalrs: Mapping[str, Any] | None = None,
        arm: str = "main",
        first_step: int = 0,
        carry: Mapping[str, Any] | None = None,
    ) -> None:
        torch.set_num_threads(recipe.threads)
        self.ctx, self.model, self.processor, self.recipe = ctx, model, processor, recipe
        self.arm, self.first_step, self.carry = arm, first_step, dict(carry or {})
        self.digests_before = part_digests(model)
        self.engine = Engine(model, recipe)
        self.stream = PackedStream(
            open_sources(inputs, recipe.weights, recipe.first_tasks),
            encoder(processor),
            seq_len=recipe.seq_len,
            batch_size=recipe.batch_size,
            look_ahead=recipe.look_ahead,
            seed=ctx.seed if seed is None else seed,
            balance=Balance(world_size(), sample_cost(model)) if recipe.visual_balance else None,
            truncate=truncation(processor, recipe),
        )
        self.total_steps = recipe.max_steps or self.stream.epoch_steps(recipe.epochs)
        self.adalrs = AdaLRS(total_steps=self.total_steps, **adalrs) if adalrs else None
        self.trial: dict[str, torch.Tensor] | None = None
        self.progress = _Progress()

    def run(self) -> dict[str, Any]:
        """Train to the last step, from the stage's newest checkpoint if there is one.

        Returns the arm's summary. Raises StopRequested after saving when the stage was asked
        to stop, and RuntimeError when a frozen part changed.
        """
        self._resume()
        started, tokens_at_start = time.monotonic(), self.progress.tokens
        while self.progress.step < self.total_steps:
            self._one_step()
            done = self.progress.step
            if done < self.total_steps and done % self.recipe.checkpoint_every == 0:
                self._save()
            if self.ctx.stop_requested:
                self._save()
                raise StopRequested(f"saved at step {done} of {self.total_steps}")
        seconds = max(time.monotonic() - started, 1e-9)
        return self._summary((self.progress.tokens - tokens_at_start) / seconds)

    def _one_step(self) -> None:
        step = self.progress.step
        batch = self.stream.next_batch()
        factor = lr_factor(
            step,
            self.total_steps,
            schedule=self.recipe.schedule,
            warmup_ratio=self.recipe.warmup_ratio,
            min_lr_ratio=self.recipe.min_lr_ratio,
        )
        scale = self.adalrs.state.scale if self.adalrs else 1.0
        lr = self.recipe.lr * factor * scale
        try:
            result = self.engine.step(batch.rows, batch.sources, lr)
        except FloatingPointError as error:
            raise FloatingPointError(f"step {step}: {error}; samples {batch.ids}") from error
        self.progress.step += 1
        self.progress.losses.append(result.loss)
        self.progress.tokens += sum(len(e.input_ids) for row in batch.rows for e in row)
        self._report(step, lr, result)
        if self.adalrs:
            self._obey(self.adalrs.observe(step, result.loss))

    def _report(self, step: int, lr: float, result: Any) -> None:
        prefix = "" if self.arm == "main" else f"{self.arm}/"
        values = {"loss": result.loss, "lr": lr, "grad_norm": result.grad_norm}
        if result.aux_loss:
            values["aux_loss"] = result.aux_loss
        if len(self.stream.sources) > 1:
            for index, loss in result.source_loss.items():
                values[f"loss/{self.stream.sources[index].name}"] = loss
        self.ctx.metric(step, **{f"{prefix}{k}": v for k, v in values.items()})
        note = f"{prefix}loss {result.loss:.3f} lr {lr:.1e}"
        self.ctx.progress(step + 1, self.total_steps, note)

    def _obey(self, action: str) -> None:
        if action == "snapshot":
            self.trial = snapshot(self.model, self.engine.optimizer)
        elif action in ("rollback", "discard"):
            assert self.trial is not None
            if action == "rollback":
                restore(self.model, self.engine.optimizer, self.trial)
            self.trial = None

    def _save(self) -> None:
        directory = self.ctx.scratch() / f"{self.arm}-{self.progress.step}"
        scalars = {
            "arm": self.arm,
            "step": self.progress.step,
            "losses": self.progress.losses,
            "tokens": self.progress.tokens,
            "stream": self.stream.state(),
            "adalrs": self.adalrs.dump() if self.adalrs else None,
            "digests_before": self.digests_before,
            "carry": self.carry,
        }
        save_state(directory, self.model, self.engine.optimizer, scalars)
        if self.trial is not None:
            save_file(self.trial, str(directory / TRIAL_FILE))
        self.ctx.checkpoints.save(self.first_step + self.progress.step, directory)

    def _resume(self) -> None:
        latest = self.ctx.checkpoints.resume_point
        if latest is None or latest[0] <= self.first_step:
            return
        directory = latest[1]
        scalars = load_state(directory, self.model, self.engine.optimizer)
        self.progress = _Progress(scalars["step"], scalars["losses"], scalars["tokens"])
        self.digests_before = scalars["digests_before"]
        self.stream.load(scalars["stream"])
        if self.adalrs:
            self.adalrs.load(scalars["adalrs"])
            if (directory / TRIAL_FILE).exists():
                self.trial = load_file(str(directory / TRIAL_FILE))

    def _summary(self, tokens_per_second: float) -> dict[str, Any]:
        after = part_digests(self.model)
        frozen = [part for part in after if part not in self.recipe.trainable]
        changed = [part for part in frozen if after[part] != self.digests_before[part]]
        if changed:
            raise RuntimeError(f"frozen parts changed during {self.ctx.stage_name}: {changed}")
        losses = self.progress.losses
        edge = max(len(losses) // 10, 1)
        summary: dict[str, Any] = {
            "steps": self.total_steps,
            "tokens": self.progress.tokens,
            "tokens_per_second": tokens_per_second,
            "loss_first": sum(losses[:edge]) / edge,
            "loss_last": sum(losses[-edge:]) / edge,
            "too_long": self.stream.num_too_long,
            "truncated": self.stream.num_truncated,
            "too_long_ids": list(self.stream.too_long),
            "trainable": list(self.recipe.trainable),
            "frozen_parts_unchanged": True,
            "part_digests_before": self.digests_before,
            "part_digests_after": after,
            **self.stream.stats.summary(),
        }
        if self.adalrs:
            summary["adalrs_events"] = self.adalrs.state.events
            summary["lr_last"] = self.recipe.lr * self.adalrs.state.scale
        return summary
