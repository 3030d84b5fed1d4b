"""Schedules, and AdaLRS against losses whose best rate is known."""

from __future__ import annotations

import numpy as np
import pytest

from training.schedules import AdaLRS, descent_speed, lr_factor


def factors(schedule: str, total: int = 100) -> list[float]:
    return [
        lr_factor(s, total, schedule=schedule, warmup_ratio=0.1, min_lr_ratio=0.1)  # type: ignore[arg-type]
        for s in range(total)
    ]


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_every_schedule_climbs_to_its_peak_and_never_above(schedule: str) -> None:
    values = factors(schedule)
    assert values[0] == pytest.approx(0.1)
    assert values[9] == pytest.approx(1.0)
    assert max(values) == pytest.approx(1.0)


def test_the_ends_of_the_schedules() -> None:
    assert factors("cosine")[-1] == pytest.approx(0.1, abs=0.01)
    assert factors("constant")[-1] == 1.0
    assert factors("wsd")[79] == 1.0
    assert factors("wsd")[-1] == pytest.approx(0.1, abs=0.05)


def test_descent_speed_is_the_fall_per_step() -> None:
    assert descent_speed([5 - 0.25 * s for s in range(9)]) == pytest.approx(0.25)


def simulate(best_scale: float, epsilon: float = 1e-4) -> tuple[AdaLRS, list[str]]:
    """A loss that falls fastest at `best_scale` and rises when the rate is far above it."""
    search = AdaLRS(total_steps=400, window=8, epsilon=epsilon)
    loss, saved, actions = 5.0, 5.0, []
    for step in range(400):
        ratio = search.state.scale / best_scale
        loss -= 0.01 * (ratio if ratio <= 1 else 2 - ratio) * np.exp(-step / 300)
        action = search.observe(step, loss)
        if action == "snapshot":
            saved = loss
        elif action == "rollback":
            loss = saved
        if action != "none":
            actions.append(action)
    return search, actions


def test_a_rate_that_is_too_low_is_raised() -> None:
    search, actions = simulate(best_scale=9.0)
    assert 2.5 < search.state.scale < 2 * 9.0  # twice the best descends as slowly as none
    assert "discard" in actions


def test_a_rate_that_is_right_is_rolled_back_to_about_itself() -> None:
    search, actions = simulate(best_scale=1.0)
    assert "rollback" in actions
    assert search.state.scale <= 1.0


def test_the_search_stays_inside_its_window_of_training() -> None:
    search, _ = simulate(best_scale=9.0)
    steps = [event["step"] for event in search.state.events]
    assert min(steps) >= 40
    assert max(steps) < 160 + 8


def test_a_resumed_search_decides_the_same() -> None:
    losses = (5 - 0.002 * np.arange(200) + 0.01 * np.sin(np.arange(200))).tolist()
    whole = AdaLRS(total_steps=200, window=5, epsilon=1e-5)
    actions = [whole.observe(s, loss) for s, loss in enumerate(losses)]
    for cut in (25, 33, 41):
        first = AdaLRS(total_steps=200, window=5, epsilon=1e-5)
        begun = [first.observe(s, losses[s]) for s in range(cut)]
        second = AdaLRS(total_steps=200, window=5, epsilon=1e-5)
        second.load(first.dump())
        assert begun + [second.observe(s, losses[s]) for s in range(cut, 200)] == actions
        assert second.dump() == whole.dump()


def test_a_window_without_a_slope_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 steps"):
        AdaLRS(total_steps=100, window=2, epsilon=0.0)
