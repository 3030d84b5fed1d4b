"""Steps that go wrong are left out, taken back, or end the run with the samples' names."""

from __future__ import annotations

import math

import pytest
import torch

from training.engine import StepResult
from training.guard import MEDIAN_OF, Diverged, Guard, OutOfMemory, within_memory


def result(loss: float, norm: float = 1.0) -> StepResult:
    return StepResult(loss, 0.0, {}, norm, {}, 10, {})


def test_a_bad_step_is_counted_and_forgotten_after_a_good_one() -> None:
    guard = Guard(max_bad_steps=2, spike_factor=None)
    assert guard.judge(0, result(math.nan), ["a"]) == "bad"
    assert guard.judge(1, result(1.0), ["b"]) == "good"
    assert guard.judge(2, result(1.0, norm=math.inf), ["c"]) == "bad"
    assert guard.state.num_bad == 2


def test_the_run_goes_back_once_and_then_ends_with_the_last_samples() -> None:
    guard = Guard(max_bad_steps=2, spike_factor=None)
    guard.judge(0, result(math.nan), ["a"])
    assert guard.judge(1, result(math.nan), ["b"]) == "roll back"
    guard.went_back()
    guard.judge(2, result(math.nan), ["c"])
    with pytest.raises(Diverged, match=r"step 3: .*lower lr.*c, d"):
        guard.judge(3, result(math.nan), ["d"])


def test_a_checkpoint_past_the_trouble_allows_going_back_again() -> None:
    guard = Guard(max_bad_steps=1, spike_factor=None)
    assert guard.judge(0, result(math.nan), ["a"]) == "roll back"
    guard.went_back()
    assert guard.judge(1, result(1.0), ["b"]) == "good"
    guard.passed_checkpoint()
    assert guard.judge(2, result(math.nan), ["c"]) == "roll back"


def test_a_spike_is_bad_once_there_is_something_to_compare_with() -> None:
    guard = Guard(max_bad_steps=3, spike_factor=2.0)
    assert guard.judge(0, result(9.0), []) == "good"
    for step in range(MEDIAN_OF):
        assert guard.judge(step, result(1.0 + 0.001 * step), []) == "good"
    assert guard.judge(99, result(1.9), []) == "good"
    assert guard.judge(100, result(2.5), []) == "bad"


def test_state_survives_a_checkpoint() -> None:
    guard, other = Guard(3, None), Guard(3, None)
    guard.judge(0, result(math.nan), ["a"])
    other.load(guard.dump())
    assert other.state == guard.state


def test_memory_that_does_not_suffice_is_told_with_the_row_and_what_helps() -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemory, match=r"step 7: the row of a\.jpg: lower micro_batch_size"):
        within_memory(fails, lambda: "step 7: the row of a.jpg")


def test_other_errors_stay_what_they_are() -> None:
    def fails() -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        within_memory(fails, lambda: "step 7")
