"""What becomes of steps that went wrong: left out, taken back, or the end of the run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

import torch

from training.engine import StepResult

MEDIAN_OF = 64
NUM_NAMED = 20

Verdict = Literal["good", "bad", "roll back"]
T = TypeVar("T")


class Diverged(FloatingPointError):
    """Losses or gradients stay no numbers, or far too high; the message names samples."""


class OutOfMemory(MemoryError):
    """A step did not fit; the message names its rows and what would help."""


@dataclass
class GuardState:
    """What the guard remembers; JSON-able.

    Attributes:
        recent: Losses of the last good steps.
        bad_ids: Samples of the bad steps in a row, up to now.
        num_bad, num_roll_backs: Of the whole run.
        rolled_back: Whether the run went back since its last checkpoint.
    """

    recent: list[float] = field(default_factory=list)
    in_a_row: int = 0
    bad_ids: list[str] = field(default_factory=list)
    num_bad: int = 0
    num_roll_backs: int = 0
    rolled_back: bool = False


class Guard:
    """Judges each step: a bad one is counted, several in a row send the run back to its last
    checkpoint and past the data that did it, and the same again right after that ends it."""

    def __init__(self, max_bad_steps: int, spike_factor: float | None) -> None:
        self.max_bad_steps, self.spike_factor = max_bad_steps, spike_factor
        self.state = GuardState()

    def judge(self, step: int, result: StepResult, ids: Sequence[str]) -> Verdict:
        """What to do about a step.

        Raises:
            Diverged: There is nothing left to try.
        """
        state = self.state
        if result.finite and not self._is_spike(result.loss):
            state.in_a_row, state.bad_ids = 0, []
            state.recent = [*state.recent, result.loss][-MEDIAN_OF:]
            return "good"
        state.num_bad += 1
        state.in_a_row += 1
        state.bad_ids = [*state.bad_ids, *ids][-NUM_NAMED:]
        if state.in_a_row < self.max_bad_steps:
            return "bad"
        if state.rolled_back:
            raise Diverged(self.complaint(step, result))
        return "roll back"

    def complaint(self, step: int, result: StepResult) -> str:
        """Why a run cannot go on."""
        state = self.state
        return (
            f"step {step}: loss {result.loss:g}, gradient norm {result.grad_norm:g}, the last of "
            f"{state.in_a_row} bad steps in a row; lower lr, or look at the samples "
            f"{', '.join(state.bad_ids)}"
        )

    def went_back(self) -> None:
        """Note that the run was taken back to its last checkpoint."""
        self.state.num_roll_backs += 1
        self.state.in_a_row, self.state.bad_ids, self.state.rolled_back = 0, [], True

    def passed_checkpoint(self) -> None:
        """Note that a new checkpoint lies past the last bad steps."""
        self.state.rolled_back = False

    def _is_spike(self, loss: float) -> bool:
        recent = self.state.recent
        if self.spike_factor is None or len(recent) < MEDIAN_OF:
            return False
        return loss > self.spike_factor * statistics.median(recent)

    def dump(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self.state)

    def load(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.state = GuardState(**state)


def within_memory(work: Callable[[], T], describe: Callable[[], str]) -> T:
    """Do `work`; OutOfMemory with what `describe` says where memory does not suffice."""
    try:
        return work()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and "allocate memory" not in str(error):
            raise
        raise OutOfMemory(
            f"{describe()}: lower micro_batch_size, set activation_checkpointing, share more "
            "(parallel=zero3) or set offload; a single row too long asks for a smaller seq_len"
        ) from error
