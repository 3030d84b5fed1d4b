"""The loop of every training stage: steps, checkpoints in the background, requests to stop."""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from sailyard.stage import StageContext, StopRequested
from sailyard.stage.checkpoints import new_token
from training.checkpointing import BackgroundSaver, read_scalars, read_tensors, write_state
from training.learner import Learner
from training.world import World

LEARNER, EXTRA = "learner/", "extra/"


class TrainingLoop:
    """Runs steps up to `total_steps`, keeping what a killed process needs to go on.

    A stage may train several times; each such arm counts its steps from `first_step` and has its
    checkpoints after those of the arms before it.

    Attributes:
        step: Steps done.
    """

    def __init__(
        self,
        ctx: StageContext,
        learner: Learner,
        world: World,
        *,
        total_steps: int,
        checkpoint_every: int,
        name: str = "main",
        first_step: int = 0,
        save_last: bool = False,
        timeout_s: float = 3600,
    ) -> None:
        """Args:
        save_last: Keep a checkpoint of the end, too, for what the stage does next.
        timeout_s: A step that takes longer ends the process.
        """
        self.ctx, self.learner, self.world = ctx, learner, world
        self.total_steps, self.checkpoint_every = total_steps, checkpoint_every
        self.name, self.first_step, self.save_last = name, first_step, save_last
        self.timeout_s = timeout_s
        self.step = 0
        self._went_back = False
        self._saver = BackgroundSaver()
        self._copy: dict[str, torch.Tensor] = {}

    def resume(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """Go back to the stage's newest checkpoint, if it is of this arm.

        Returns:
            The scalars and extra tensors that were saved with it; the learner has its own back.
        """
        latest = self.ctx.checkpoints.resume_point
        if latest is None or latest[0] <= self.first_step:
            return None
        return self._load(latest[1])

    def roll_back(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """As `resume`, in a run under way: the newest checkpoint of this arm, or None."""
        self._saver.wait()
        self.world.gather(None)  # every rank's part is written before any rank looks
        latest = self.ctx.checkpoints.latest()
        if latest is None or latest[0] <= self.first_step:
            return None
        self._went_back = True
        return self._load(latest[1])

    def rewind(self, step: int) -> None:
        """Let the step under way be followed by `step`, whose state the caller has put back."""
        self.step, self._went_back = step, True

    def run(
        self,
        one_step: Callable[[int], None],
        scalars: Callable[[], Mapping[str, Any]],
        extra: Callable[[], Mapping[str, torch.Tensor]] = dict,
    ) -> None:
        """Call `one_step` with 0-based steps until all are done.

        Args:
            scalars: JSON-able state of the run besides weights and optimizer.
            extra: Tensors besides these; each rank gives its share.

        Raises:
            StopRequested: After saving, when the stage was asked to stop.
        """
        try:
            while self.step < self.total_steps:
                self._went_back = False
                with _Watchdog(self.timeout_s):
                    one_step(self.step)
                if self._went_back:
                    continue
                self.step += 1
                stop = self.world.any(self.ctx.stop_requested)
                last = self.step == self.total_steps
                due = self.step % self.checkpoint_every == 0
                if stop or (self.save_last if last else due):
                    self._save(scalars(), extra())
                if stop:
                    self._saver.wait()
                    self.world.gather(None)  # no rank may end another's save by ending
                    raise StopRequested(f"saved at step {self.step} of {self.total_steps}")
            self._saver.wait()
        except BaseException:
            # What is under way may still be completed; its own error matters less than this one.
            # Of several ranks one may be gone, and its part would be waited for in vain.
            if self.world.size == 1:
                with suppress(BaseException):
                    self._saver.wait()
            raise

    def _save(self, scalars: Mapping[str, Any], extra: Mapping[str, torch.Tensor]) -> None:
        """Copy the state, and leave writing it to the background."""
        self._saver.wait()
        rank, step = self.world.rank, self.first_step + self.step
        token = self.world.from_first(new_token())
        directory = self.ctx.scratch() / f"{self.name}-{self.step}"
        # An arm that follows another may freeze what that one trained.
        # Nothing reads the last copy any more, and memory that is there already is faster.
        self._copy = self.learner.tensors(frozen=self.first_step > 0, into=self._copy)
        tensors = {f"{LEARNER}{name}": value for name, value in self._copy.items()}
        tensors |= {f"{EXTRA}{name}": value.clone() for name, value in extra.items()}
        state = {**scalars, "loop_step": self.step}
        frozen_state: dict[str, Any] = _copied(state)

        def save() -> None:
            write_state(directory, rank, tensors, frozen_state)
            self.ctx.checkpoints.save(step, directory, rank, token)

        self._saver.start(directory, save)

    def _load(self, directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        tensors = read_tensors(directory, self.world.rank)
        learner = {
            name.removeprefix(LEARNER): value
            for name, value in tensors.items()
            if name.startswith(LEARNER)
        }
        try:
            self.learner.load(learner)
        except ValueError as error:
            raise ValueError(f"checkpoint {directory}: {error}") from error
        scalars = read_scalars(directory)
        self.step = scalars.pop("loop_step")
        extra = {
            name.removeprefix(EXTRA): value
            for name, value in tensors.items()
            if name.startswith(EXTRA)
        }
        return scalars, extra


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state as it is now: training goes on while it is written."""
    import json

    copy: dict[str, Any] = json.loads(json.dumps(state))
    return copy


class _Watchdog:
    """Ends a process whose block takes too long, after writing where each of its threads is.

    Every rank has its own, and all wait for the one that hangs, so all of them tell.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def __enter__(self) -> None:
        with suppress(OSError, ValueError, AttributeError):  # a stream without a descriptor
            faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
