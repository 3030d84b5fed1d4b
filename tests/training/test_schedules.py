"""Schedules, and AdaLRS against losses whose best rate is known."""

from __future__ import annotations

import numpy as np
import pytest

from training.schedules import AdaLRS, descent_speed, faster_by, lr_factor


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
    speed = descent_speed([5 - 0.25 * s for s in range(9)])
    assert speed.value == pytest.approx(0.25)
    assert speed.error == pytest.approx(0.0, abs=1e-9)
    assert descent_speed([5.0, None, 4.5, 4.25, None]).value == pytest.approx(0.25)


def test_the_standard_error_is_how_far_speeds_scatter() -> None:
    rng = np.random.default_rng(0)
    steps = np.arange(20)
    speeds = [descent_speed(list(5 - 0.1 * steps + rng.normal(0, 0.3, 20))) for _ in range(2000)]
    scatter = float(np.std([speed.value for speed in speeds]))
    assert scatter == pytest.approx(0.3 / np.sqrt(np.sum((steps - 9.5) ** 2)), rel=0.05)
    assert np.mean([speed.error for speed in speeds]) == pytest.approx(scatter, rel=0.05)


def test_two_rates_on_the_same_samples_differ_without_the_noise_of_the_samples() -> None:
    noise = np.random.default_rng(1).normal(0, 0.3, 10)
    base = [float(5 - 0.02 * s + noise[s]) for s in range(10)]
    trial = [float(5 - 0.05 * s + noise[s]) for s in range(10)]
    gain = faster_by(base, trial)
    assert gain.value == pytest.approx(0.03)
    assert gain.error < 1e-9 < descent_speed(base).error
    assert faster_by([None, *base[1:]], [*trial[:-1], None]).value == pytest.approx(0.03)
    assert faster_by([None] * 10, trial).error == np.inf


def simulate(
    best_scale: float, noise: float = 0.0, seed: int = 0, **settings: float
) -> tuple[AdaLRS, list[str]]:
    """A loss that falls fastest at `best_scale` and rises when the rate is far above it.

    Every step's samples add the same to it whatever the rate (`noise`), and a little of its own.
    """
    search = AdaLRS(total_steps=400, **{"window": 8, **settings})  # type: ignore[arg-type]
    rng = np.random.default_rng(seed)
    samples = rng.normal(0, noise, 400)
    step, loss = 0, 5.0
    moments: dict[str, tuple[int, float]] = {}
    actions = []
    while step < 400:
        ratio = search.state.scale / best_scale
        loss -= 0.01 * (ratio if ratio <= 1 else 2 - ratio) * np.exp(-step / 300)
        action = search.observe(step, loss + samples[step] + rng.normal(0, noise / 50))
        step += 1
        if action == "mark":
            moments["mark"] = step, loss
        elif action == "try":
            moments["end"] = step, loss
            step, loss = moments["mark"]
        elif action == "undo":
            assert moments["end"][0] == step
            loss = moments["end"][1]
        if action != "none":
            actions.append(action)
    return search, actions


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_rate_that_is_too_low_is_raised(noise: float) -> None:
    search, actions = simulate(9.0, noise)
    assert 2.5 < search.state.scale < 2 * 9.0  # twice the best descends as slowly as none
    assert "keep" in actions
    assert search.state.num_repeated == 8 * actions.count("try")


def test_a_rate_that_is_right_stays_about_itself() -> None:
    search, actions = simulate(1.0)
    assert "undo" in actions
    assert search.state.scale <= 1.0


def test_a_rate_that_is_too_high_is_lowered_by_a_trial() -> None:
    search, _ = simulate(0.6)
    whats = [(event["what"], event["tried"]) for event in search.state.events]
    assert whats[0] == ("slower", 3.0)
    assert whats[1][0] == "kept"
    assert whats[1][1] < 1
    assert 0.3 < search.state.scale < 0.9


def test_noise_alone_moves_no_rate() -> None:
    """Losses that depend on no rate: of many trials about one in twenty errs, by design."""
    moved = 0
    trials = 0
    for seed in range(20):
        search = simulate(np.inf, 0.3, seed)[0]  # a rate that is nothing of the best does nothing
        whats = [event["what"] for event in search.state.events]
        trials += len(whats)
        moved += sum(what != "no difference" for what in whats)
    assert trials > 60
    assert moved < 0.15 * trials


def test_a_trial_that_explodes_is_undone_whatever_its_noise() -> None:
    search = AdaLRS(total_steps=100, window=5, epsilon=1e9, start=0.1, end=0.9)
    step, actions = 0, []
    while "try" not in actions:
        actions.append(search.observe(step, 5 - 0.01 * step))
        step += 1
    before = search.state.scale_before
    for _ in range(5):
        actions.append(search.observe(step, 50.0))
        step += 1
    assert actions[-1] == "undo"
    assert search.state.scale == before
    assert search.state.down  # and a lower rate is tried next


def test_a_run_that_goes_back_by_itself_forgets_its_trial() -> None:
    search = AdaLRS(total_steps=100, window=5, start=0.1, end=0.9)
    step = 0
    while search.observe(step, 5 - 0.01 * step) != "try":
        step += 1
    assert search.state.scale > 1
    search.cancel()
    assert search.state.scale == 1.0
    assert (search.state.phase, search.state.window, search.state.base) == ("watch", [], [])


def test_the_search_stays_inside_its_window_of_training() -> None:
    search, _ = simulate(9.0)
    steps = [event["step"] for event in search.state.events]
    assert min(steps) >= 40
    assert max(steps) < 160 + 8


def test_a_resumed_search_decides_the_same() -> None:
    losses = (5 - 0.002 * np.arange(200) + 0.01 * np.sin(np.arange(200))).tolist()
    whole = AdaLRS(total_steps=200, window=5)
    actions = [whole.observe(s, loss) for s, loss in enumerate(losses)]
    for cut in (25, 33, 41):
        first = AdaLRS(total_steps=200, window=5)
        begun = [first.observe(s, losses[s]) for s in range(cut)]
        second = AdaLRS(total_steps=200, window=5)
        second.load(first.dump())
        assert begun + [second.observe(s, losses[s]) for s in range(cut, 200)] == actions
        assert second.dump() == whole.dump()


def test_a_window_without_a_slope_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 steps"):
        AdaLRS(total_steps=100, window=2)
