"""Learning-rate schedules, and AdaLRS: a search for the rate while training runs.

AdaLRS (paper section 3.2.3; arXiv 2506.13274) watches how fast the loss falls. When the
descent slows it tries a larger rate for one window; it keeps the larger rate if the loss then
fell faster, undoes the trial (weights and optimizer) and lowers the rate if it fell slower,
and goes on as before if the difference is noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np


def lr_factor(
    step: int,
    total_steps: int,
    *,
    schedule: Literal["cosine", "constant", "wsd"],
    warmup_ratio: float,
    min_lr_ratio: float,
) -> float:
    """Multiplier of the peak rate at `step` (0-based).

    `cosine` falls to `min_lr_ratio` at the end, `wsd` (warm-up, stable, decay) stays flat and
    falls linearly over the last fifth, `constant` only warms up.
    """
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    if schedule == "wsd":
        decay_start = 0.8 * total_steps
        if step < decay_start:
            return 1.0
        progress = (step - decay_start) / max(total_steps - decay_start, 1)
        return 1.0 - (1.0 - min_lr_ratio) * min(progress, 1.0)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def descent_speed(losses: Sequence[float]) -> float:
    """Fall of the loss per step over a window: minus the least-squares slope."""
    steps = np.arange(len(losses), dtype=np.float64)
    steps -= steps.mean()
    values = np.asarray(losses, dtype=np.float64)
    return float(-(steps @ (values - values.mean())) / (steps @ steps))


Action = Literal["none", "snapshot", "rollback", "discard"]


@dataclass
class AdaLRSState:
    """Everything AdaLRS remembers; JSON-able, so that a resumed run decides the same."""

    scale: float = 1.0
    attempts: int = 0
    window: list[float] = field(default_factory=list)
    previous_speed: float | None = None
    previous_mean: float | None = None
    max_loss: float = 0.0
    rises: int = 0
    trial: bool = False
    scale_before: float = 1.0
    speed_before: float = 0.0
    events: list[dict[str, Any]] = field(default_factory=list)


class AdaLRS:
    """Decides, one loss at a time, by how much the base schedule's rate is scaled.

    After every step call `observe`; obey the returned action before the next step:
    `snapshot` = copy model and optimizer now (a trial begins), `rollback` = restore that copy,
    `discard` = the copy is no longer needed.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        a: int = 3,
        b: int = 2,
        decay: float = 0.99,
        window: int,
        epsilon: float,
        start: float = 0.10,
        end: float = 0.40,
    ) -> None:
        if window < 3:
            raise ValueError(f"adalrs.window is {window}: a slope needs at least 3 steps")
        self.a, self.b, self.decay = a, b, decay
        self.window, self.epsilon = window, epsilon
        self.first_step = math.ceil(start * total_steps)
        self.last_step = math.floor(end * total_steps)
        self.state = AdaLRSState()

    def observe(self, step: int, loss: float) -> Action:
        """Take the loss of `step` (0-based) and say what to do before the next one."""
        state = self.state
        if step < self.first_step:
            state.max_loss = max(state.max_loss, loss)
            return "none"
        if step >= self.last_step and not state.trial:
            return "none"
        state.window.append(loss)
        if len(state.window) < self.window:
            return "none"
        speed, mean = descent_speed(state.window), float(np.mean(state.window))
        state.window = []
        action = (
            self._judge_trial(step, speed, mean)
            if state.trial
            else self._consider(step, speed, mean)
        )
        state.previous_mean = mean
        state.max_loss = max(state.max_loss, mean)
        return action

    def _consider(self, step: int, speed: float, mean: float) -> Action:
        """A plain window has ended: lower after two rising ones, try higher when descent slows."""
        state = self.state
        state.rises = state.rises + 1 if speed < 0 else 0
        slowed = state.previous_speed is None or speed < state.previous_speed
        state.previous_speed = speed
        if state.rises >= 2:
            state.rises = 0
            state.scale /= self._down_divisor()
            self._record(step, "lowered: loss rose over two windows", speed)
            return "none"
        can_finish = step + self.window < self.last_step
        if not slowed or not can_finish or mean > state.max_loss:
            return "none"
        state.trial, state.scale_before, state.speed_before = True, state.scale, speed
        state.scale *= max(self.decay**state.attempts * self.a, 1.0)
        state.attempts += 1
        self._record(step, "trial", speed)
        return "snapshot"

    def _judge_trial(self, step: int, speed: float, mean: float) -> Action:
        state = self.state
        state.trial = False
        exploded = mean > state.max_loss
        if speed > state.speed_before + 2 * self.epsilon and not exploded:
            state.previous_speed = speed
            self._record(step, "kept", speed)
            return "discard"
        if exploded or speed < state.speed_before - 2 * self.epsilon:
            state.scale = state.scale_before / self._down_divisor()
            state.previous_speed = None
            self._record(step, "rolled back", speed)
            return "rollback"
        state.scale = state.scale_before
        state.previous_speed = speed
        self._record(step, "no difference", speed)
        return "discard"

    def _down_divisor(self) -> float:
        return max(self.decay**self.state.attempts * self.b, 1.0)

    def _record(self, step: int, what: str, speed: float) -> None:
        self.state.events.append(
            {"step": step, "what": what, "scale": self.state.scale, "speed": speed}
        )

    def dump(self) -> dict[str, Any]:
        return asdict(self.state)

    def load(self, state: dict[str, Any]) -> None:
        self.state = AdaLRSState(**state)
