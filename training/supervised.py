"""The supervised loop that every non-RL training stage runs: resumable, bit for bit."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from model.modeling import SailVLForConditionalGeneration, part_digests
from model.processor import Encoded, SailVLProcessor
from sailyard.media import decode_image, image_size
from sailyard.recipe import TrainRecipe
from sailyard.samples import OpenFile, Sample
from sailyard.stage import RankDone, StageContext
from training.balance import Balance, sample_cost
from training.checkpointing import read_scalars
from training.engine import Engine, StepResult
from training.guard import Diverged, Guard, within_memory
from training.loop import TrainingLoop
from training.meter import Meter
from training.packing import PackingStats, truncated
from training.prefetch import Prefetch
from training.schedules import Action, AdaLRS, lr_factor
from training.stream import PackedStream, StreamBatch, open_sources
from training.world import join_world

SPEED_EVERY = 10
"""Steps between points of the series about speed (our choice)."""


class Encoder:
    """How a stored sample becomes token ids, loss mask and pixels: pixels only when decoded."""

    def __init__(self, processor: SailVLProcessor) -> None:
        self._processor = processor

    def __call__(self, sample: Sample) -> Encoded:
        """Everything but the pixels, from texts and image headers."""
        sizes = [image_size(data) for data in sample.images]
        return self._processor.lay_out(sample.messages, sizes, is_video=sample.is_video)

    def decode(self, sample: Sample, encoded: Encoded) -> Encoded:
        """The same with its pixels.

        Raises:
            ValueError: An image is damaged, or not as large as its header says.
        """
        images = [decode_image(data) for data in sample.images]
        pixels = self._processor.see(images, is_video=sample.is_video)
        if pixels.shape != encoded.pixel_values.shape:
            raise ValueError(
                f"sample {sample.id!r}: an image has another size than its header says"
            )
        return replace(encoded, pixel_values=pixels)


def truncation(
    processor: SailVLProcessor, recipe: TrainRecipe
) -> Callable[[Encoded], Encoded | None] | None:
    """How samples longer than a row are cut, if the recipe wants them cut."""
    if recipe.too_long == "quarantine":
        return None
    return partial(truncated, seq_len=recipe.seq_len, image_token_id=processor.image_token_id)


def carried(ctx: StageContext, first_step: int) -> dict[str, Any] | None:
    """What the arms before `first_step` measured, if the newest checkpoint is past them."""
    latest = ctx.checkpoints.resume_point
    if latest is None or latest[0] <= first_step:
        return None
    carry: dict[str, Any] = read_scalars(latest[1])["carry"]
    return carry


def essentials(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What later arms carry of an arm's summary: the same however often it was cut off."""
    return {key: summary[key] for key in ("loss_first", "loss_last", "steps", "tokens")}


@dataclass(slots=True)
class _Progress:
    """What a run remembers besides weights, optimizer and stream."""

    losses: list[float] = field(default_factory=list)  # of good steps
    tokens: int = 0
    samples: str = ""  # chained sha256 of every step's sample ids, in order

    def saw(self, batch: StreamBatch) -> None:
        """Count a batch."""
        self.tokens += sum(len(encoded.input_ids) for row in batch.rows for encoded in row)
        seen = "\n".join([self.samples, *batch.ids]).encode()
        self.samples = hashlib.sha256(seen).hexdigest()


@dataclass(frozen=True, slots=True)
class _Moment:
    """A run at one step: where it is, and this rank's share of what learns."""

    scalars: dict[str, Any]
    tensors: dict[str, torch.Tensor]


class SupervisedRun:
    """One pass of supervised training of a model on a mixture.

    `arm` names the run inside its stage: a stage that trains twice (AdaLRS beside its control)
    gives each arm its own checkpoints through `first_step`, the number its steps count from, and
    `carry`, what the arms before it measured.

    Attributes:
        model: After `run` with all its weights, whichever way ranks shared them.
    """

    def __init__(
        self,
        ctx: StageContext,
        model: SailVLForConditionalGeneration,
        processor: SailVLProcessor,
        recipe: TrainRecipe,
        inputs: Mapping[str, Path | OpenFile],
        *,
        seed: int | None = None,
        adalrs: Mapping[str, Any] | None = None,
        arm: str = "main",
        first_step: int = 0,
        carry: Mapping[str, Any] | None = None,
    ) -> None:
        torch.set_num_threads(recipe.threads)
        self.ctx, self.model, self.processor, self.recipe = ctx, model, processor, recipe
        self.arm, self.carry = arm, dict(carry or {})
        self.world = join_world()
        self.digests_before = part_digests(model)
        encoder = Encoder(processor)
        self.stream = PackedStream(
            open_sources(inputs, recipe.weights, recipe.first_tasks),
            encoder,
            seq_len=recipe.seq_len,
            batch_size=recipe.batch_size,
            look_ahead=recipe.look_ahead,
            seed=ctx.seed if seed is None else seed,
            balance=Balance(self.world.size, sample_cost(model)) if recipe.visual_balance else None,
            truncate=truncation(processor, recipe),
            decode=encoder.decode,
            rank=self.world.rank,
            workers=recipe.threads,
        )
        self.total_steps = recipe.max_steps or self.stream.epoch_steps(recipe.epochs)
        self.batches = Prefetch(self.stream)
        self.adalrs = AdaLRS(total_steps=self.total_steps, **adalrs) if adalrs else None
        self.moments: dict[str, _Moment] = {}
        self.guard = Guard(recipe.max_bad_steps, recipe.spike_factor)
        self.meter = Meter(model, recipe, self.world)
        self.progress = _Progress()
        self.engine = Engine(model, recipe, self.world)
        self.loop = TrainingLoop(
            ctx,
            self.engine.learner,
            self.world,
            total_steps=self.total_steps,
            checkpoint_every=recipe.checkpoint_every,
            name=arm,
            first_step=first_step,
            timeout_s=recipe.step_timeout_s,
        )

    def run(self, *, final: bool = True, everywhere: bool = False) -> dict[str, Any]:
        """Train to the last step, from the stage's newest checkpoint if there is one.

        Args:
            final: Nothing else in the stage needs several ranks. All but rank 0 end here.
            everywhere: Every rank needs the whole `model`, not rank 0 alone.

        Returns:
            The arm's summary.

        Raises:
            StopRequested: After saving, when the stage was asked to stop.
            RankDone: On every rank but 0, when `final`.
            RuntimeError: A frozen part changed.
        """
        resumed = self.loop.resume()
        if resumed is not None:
            self._load(*resumed)
        started, tokens_at_start = time.monotonic(), self.progress.tokens
        try:
            self.loop.run(self._one_step, self._state, self._moment_tensors)
        finally:
            self.batches.close()
        seconds = max(time.monotonic() - started, 1e-9)
        speed = (self.progress.tokens - tokens_at_start) / seconds
        learner = self.engine.learner
        whole = learner.whole_everywhere() if everywhere else learner.whole()
        assert isinstance(whole, SailVLForConditionalGeneration)
        self.model = whole
        if final and self.world.rank.number:
            raise RankDone
        after = part_digests(self.model) if self.world.rank.number == 0 else {}
        return self._summary(speed, after if final else self.world.from_first(after))

    def _one_step(self, step: int) -> None:
        with self.meter.waiting():
            batch = self.batches.next_batch()
        scale = self.adalrs.state.scale if self.adalrs else 1.0
        factor = lr_factor(
            step,
            self.total_steps,
            schedule=self.recipe.schedule,
            warmup_ratio=self.recipe.warmup_ratio,
            min_lr_ratio=self.recipe.min_lr_ratio,
        )
        lr = self.recipe.lr * factor * scale
        rows, sources = self.world.own(batch.rows), self.world.own(batch.sources)
        with self.meter.stepping(batch):
            result = within_memory(
                lambda: self.engine.step(rows, sources, lr, len(self.stream.sources)),
                lambda: f"step {step} does not fit into memory; {_described(batch)}",
            )
        verdict = self.guard.judge(step, result, batch.ids)
        if verdict == "roll back":
            self._go_back(step, result)
            return
        self.progress.saw(batch)
        if verdict == "bad":
            self.ctx.metric(step, **{f"{self._prefix}bad_steps": self.guard.state.num_bad})
        else:
            self.progress.losses.append(result.loss)
            self._report(step, lr, result)
            if (step + 1) % self.recipe.checkpoint_every == 0:
                self.guard.passed_checkpoint()
        if self.adalrs:
            self._obey(self.adalrs.observe(step, result.loss if verdict == "good" else None))

    def _go_back(self, step: int, result: StepResult) -> None:
        """Weights and schedule of the last checkpoint; the stream goes on behind the bad data."""
        stream, guard = self.batches.state(), self.guard.dump()
        complaint = self.guard.complaint(step, result)
        saved = self.loop.roll_back()
        if saved is None:
            raise Diverged(f"{complaint}; there is no checkpoint yet to go back to")
        self._load(*saved)
        self.batches.load(stream)
        self.guard.load(guard)
        self.guard.went_back()
        if self.adalrs:
            self.adalrs.cancel()
            self.moments = {}

    @property
    def _prefix(self) -> str:
        """Before the names of metrics; second runs of a trial have series of their own."""
        arm = "" if self.arm == "main" else f"{self.arm}/"
        again = self.adalrs is not None and self.adalrs.state.phase == "trial"
        return f"{arm}trial/" if again else arm

    def _report(self, step: int, lr: float, result: StepResult) -> None:
        values = {"loss": result.loss, "lr": lr, "grad_norm": result.grad_norm}
        if result.aux_loss:
            values["aux_loss"] = result.aux_loss
        if len(self.stream.sources) > 1:
            for index, loss in result.source_loss.items():
                values[f"loss/{self.stream.sources[index].name}"] = loss
        if (step + 1) % SPEED_EVERY == 0:
            values |= {f"grad_norm/{part}": norm for part, norm in result.part_norms.items()}
            values |= result.router | self.meter.read()
        self.ctx.metric(step, **{f"{self._prefix}{k}": v for k, v in values.items()})
        note = f"{self._prefix}loss {result.loss:.3f} lr {lr:.1e}"
        self.ctx.progress(step + 1, self.total_steps, note)

    def _obey(self, action: Action) -> None:
        """What AdaLRS wants done with the run after a step."""
        if action == "mark":
            self.moments = {"mark": self._moment()}
        elif action == "try":
            self.moments["end"] = self._moment()
            self._return_to("mark")
            self.loop.rewind(self.moments["mark"].scalars["next_step"])
        elif action in ("keep", "undo"):
            if action == "undo":
                self._return_to("end")
            self.moments = {}

    def _moment(self) -> _Moment:
        """The run as it is after the step under way."""
        scalars = {"next_step": self.loop.step + 1, **self._place()}
        return _Moment(copy.deepcopy(scalars), self.engine.learner.tensors(frozen=False))

    def _return_to(self, name: str) -> None:
        moment = self.moments[name]
        self.engine.learner.load(moment.tensors)
        self._load_place(moment.scalars)

    def _moment_tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}/{key}": value
            for name, moment in self.moments.items()
            for key, value in moment.tensors.items()
        }

    def _place(self) -> dict[str, Any]:
        """Where a run is in its data, and what it saw on the way."""
        return {
            "losses": self.progress.losses,
            "tokens": self.progress.tokens,
            "samples": self.progress.samples,
            "stream": self.batches.state(),
            "guard": self.guard.dump(),
        }

    def _load_place(self, place: Mapping[str, Any]) -> None:
        self.progress = _Progress(list(place["losses"]), place["tokens"], place["samples"])
        self.batches.load(place["stream"])
        self.guard.load(place["guard"])

    def _state(self) -> dict[str, Any]:
        return {
            **self._place(),
            "arm": self.arm,
            "adalrs": self.adalrs.dump() if self.adalrs else None,
            "moments": {name: moment.scalars for name, moment in self.moments.items()},
            "digests_before": self.digests_before,
            "carry": self.carry,
        }

    def _load(self, scalars: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        self._load_place(scalars)
        self.digests_before = scalars["digests_before"]
        if self.adalrs:
            self.adalrs.load(scalars["adalrs"])
            self.moments = {
                name: _Moment(
                    place,
                    {
                        key.removeprefix(f"{name}/"): value
                        for key, value in tensors.items()
                        if key.startswith(f"{name}/")
                    },
                )
                for name, place in scalars["moments"].items()
            }

    def _summary(self, tokens_per_second: float, after: Mapping[str, str]) -> dict[str, Any]:
        frozen = [part for part in after if part not in self.recipe.trainable]
        changed = [part for part in frozen if after[part] != self.digests_before[part]]
        if changed:
            raise RuntimeError(f"frozen parts changed during {self.ctx.stage_name}: {changed}")
        data = self.batches.state()
        packing = PackingStats()
        packing.load(data["stats"])
        losses = self.progress.losses
        edge = max(len(losses) // 10, 1)
        summary: dict[str, Any] = {
            "steps": self.total_steps,
            "tokens": self.progress.tokens,
            "tokens_per_second": tokens_per_second,
            "ranks": self.world.size,
            "sample_order": self.progress.samples,
            "loss_first": sum(losses[:edge]) / edge,
            "loss_last": sum(losses[-edge:]) / edge,
            "bad_steps": self.guard.state.num_bad,
            "roll_backs": self.guard.state.num_roll_backs,
            "too_long": data["num_too_long"],
            "truncated": data["num_truncated"],
            "too_long_ids": data["too_long"],
            "trainable": list(self.recipe.trainable),
            "frozen_parts_unchanged": True,
            "part_digests_before": self.digests_before,
            "part_digests_after": dict(after),
            **packing.summary(),
        }
        if self.adalrs:
            summary["adalrs_events"] = self.adalrs.state.events
            summary["adalrs_repeated_steps"] = self.adalrs.state.num_repeated
            summary["lr_last"] = self.recipe.lr * self.adalrs.state.scale
        return summary


def _described(batch: StreamBatch) -> str:
    """The longest row of a step: its samples, tokens and pixels."""
    lengths = [sum(len(e.input_ids) for e in row) for row in batch.rows]
    pixels = [sum(e.pixel_values.size for e in row) for row in batch.rows]
    row = max(range(len(lengths)), key=lambda r: (pixels[r], lengths[r]))
    first = sum(len(r) for r in batch.rows[:row])
    ids = batch.ids[first : first + len(batch.rows[row])]
    return f"its largest row holds {lengths[row]} tokens and {pixels[row]} pixel values: {ids}"
