"""Learning-rate schedules, and AdaLRS: a search for the rate while training runs.

AdaLRS (paper section 3.2.3; arXiv 2506.13274) watches how fast the loss falls. When the descent
slows it trains the next window twice from the same weights and on the same samples, at the rate as
it is and at a larger one. Where the loss falls faster at the larger rate, that run goes on and the
rate stays; where it falls more slowly the run at the old rate goes on, and the next trial is of a
lower rate; where the difference is noise it goes on as it was.

The paper compares the window before the trial with the trial itself. Those are other samples, and
the descent slows by itself: over ten steps both outweigh the effect (docs/log.md). With the window
repeated neither is in the difference, and the noise that is left is measured (`faster_by`). The
paper also lowers the rate at once when a larger one fails; that three times is too much does not
say that half is better, so here a lower rate must win a trial as well (docs/log.md).
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


@dataclass(frozen=True, slots=True)
class Speed:
    """A fall of the loss per step, and its standard error."""

    value: float
    error: float


def descent_speed(losses: Sequence[float | None]) -> Speed:
    """Fall of the loss per step over a window: minus the least-squares slope.

    Args:
        losses: One per step; None for a step that does not count.
    """
    steps, values = _counted(losses)
    if len(steps) < 3:
        return Speed(0.0, math.inf)
    steps = steps - steps.mean()
    values = values - values.mean()
    slope = float(steps @ values / (steps @ steps))
    residual = values - slope * steps
    variance = float(residual @ residual) / (len(steps) - 2)
    return Speed(-slope, math.sqrt(variance / float(steps @ steps)))


def faster_by(base: Sequence[float | None], trial: Sequence[float | None]) -> Speed:
    """How much faster the loss falls in `trial` than in `base`, the same steps at two rates.

    Both start from the same weights, so their difference d_t = base_t - trial_t is 0 at step t = 0:
    its slope is sum(t d_t) / sum(t^2), a line through the origin, and the standard error
    sqrt(sum((d_t - slope t)^2) / (n - 1) / sum(t^2)). What the samples of a step add to both losses
    is not in it.
    """
    pairs = zip(base, trial, strict=True)
    differences = [None if None in pair else pair[0] - pair[1] for pair in pairs]  # type: ignore[operator]
    steps, values = _counted(differences)
    squares = float(steps @ steps)
    if len(steps) < 3:
        return Speed(0.0, math.inf)
    slope = float(steps @ values) / squares
    residual = values - slope * steps
    variance = float(residual @ residual) / (len(steps) - 1)
    return Speed(slope, math.sqrt(variance / squares))


def _counted(losses: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses of those that count."""
    kept = [(step, loss) for step, loss in enumerate(losses) if loss is not None]
    table = np.array(kept, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


Action = Literal["none", "mark", "try", "keep", "undo"]


@dataclass
class AdaLRSState:
    """Everything AdaLRS remembers; JSON-able, so that a resumed run decides the same.

    Attributes:
        phase: What the window under way is for: to watch, or the two runs of a trial.
        down: Whether the next trial is of a lower rate.
        base: Losses of a trial's first run, at the rate as it was.
        num_repeated: Steps of second runs: what the search has cost.
    """

    scale: float = 1.0
    attempts: int = 0
    phase: Literal["watch", "base", "trial"] = "watch"
    down: bool = False
    window: list[float | None] = field(default_factory=list)
    base: list[float | None] = field(default_factory=list)
    previous_speed: float | None = None
    max_loss: float = 0.0
    rises: int = 0
    scale_before: float = 1.0
    num_repeated: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)


class AdaLRS:
    """Decides, one loss at a time, by how much the base schedule's rate is scaled.

    After every step call `observe`; obey the returned action before the next step:
    `mark` = remember the run as it is now, `try` = remember it as it is now, too, and go back to
    the mark, `keep` = go on, `undo` = return to where `try` left.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        a: int = 3,
        b: int = 2,
        decay: float = 0.99,
        window: int,
        epsilon: float = 1.0,
        start: float = 0.10,
        end: float = 0.40,
    ) -> None:
        """Args:
        epsilon: Speeds differ when they do by more than 2 epsilon standard errors.
        """
        if window < 3:
            raise ValueError(f"adalrs.window is {window}: a slope needs at least 3 steps")
        self.a, self.b, self.decay = a, b, decay
        self.window, self.epsilon = window, epsilon
        self.first_step = math.ceil(start * total_steps)
        self.last_step = math.floor(end * total_steps)
        self.state = AdaLRSState()

    def observe(self, step: int, loss: float | None) -> Action:
        """Take the loss of `step` (0-based; None if it was bad) and say what to do next."""
        state = self.state
        if step < self.first_step:
            state.max_loss = max(state.max_loss, loss or 0.0)
            return "none"
        if step >= self.last_step and state.phase == "watch":
            return "none"
        state.window.append(loss)
        state.num_repeated += state.phase == "trial"
        if len(state.window) < self.window:
            return "none"
        window, state.window = state.window, []
        if state.phase == "watch":
            return self._consider(step, window)
        if state.phase == "base":
            state.base, state.phase = window, "trial"
            state.scale_before = state.scale
            if state.down:
                state.scale /= self._down_divisor()
            else:
                state.scale *= max(self.decay**state.attempts * self.a, 1.0)
            state.attempts += 1
            return "try"
        return self._judge(step, window)

    def cancel(self) -> None:
        """Forget a trial and the window under way: the run has gone back on its own account."""
        state = self.state
        if state.phase == "trial":
            state.scale = state.scale_before
        state.phase, state.window, state.base = "watch", [], []

    def _consider(self, step: int, window: Sequence[float | None]) -> Action:
        """A plain window has ended: lower after two rising ones, try higher when descent slows."""
        state, speed, mean = self.state, descent_speed(window), _mean(window)
        state.rises = state.rises + 1 if speed.value < -2 * self.epsilon * speed.error else 0
        slowed = state.previous_speed is None or speed.value < state.previous_speed
        state.previous_speed = speed.value
        may_rise = mean <= state.max_loss
        state.max_loss = max(state.max_loss, mean)
        if state.rises >= 2:
            state.rises = 0
            state.scale /= self._down_divisor()
            self._record(step, "lowered: loss rose over two windows", speed, state.scale)
            return "none"
        if not slowed or not (may_rise or state.down) or step + self.window >= self.last_step:
            return "none"
        state.phase = "base"
        return "mark"

    def _judge(self, step: int, window: Sequence[float | None]) -> Action:
        state, gain = self.state, faster_by(self.state.base, window)
        exploded = _mean(window) > state.max_loss
        margin = 2 * self.epsilon * gain.error
        kept = gain.value > margin and not exploded
        slower = exploded or gain.value < -margin
        tried = state.scale
        state.phase, state.down = "watch", slower and not state.down
        state.previous_speed = descent_speed(window if kept else state.base).value
        if state.down:
            state.previous_speed = None  # the lower rate's turn, however the loss falls
        if not kept:
            state.scale = state.scale_before
        what = "kept" if kept else "slower" if slower else "no difference"
        self._record(step, what, gain, tried)
        return "keep" if kept else "undo"

    def _down_divisor(self) -> float:
        return max(self.decay**self.state.attempts * self.b, 1.0)

    def _record(self, step: int, what: str, speed: Speed, tried: float) -> None:
        self.state.base = []
        self.state.events.append(
            {
                "step": step,
                "what": what,
                "scale": self.state.scale,
                "tried": tried,
                "speed": speed.value,
                "error": speed.error,
            }
        )

    def dump(self) -> dict[str, Any]:
        return asdict(self.state)

    def load(self, state: dict[str, Any]) -> None:
        self.state = AdaLRSState(**state)


def _mean(losses: Sequence[float | None]) -> float:
    values = _counted(losses)[1]
    return float(values.mean()) if len(values) else math.inf
