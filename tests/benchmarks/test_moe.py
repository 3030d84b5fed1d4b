"""The experts' benchmark compares before it times, and says what it measured."""

from __future__ import annotations

import json

import pytest

from benchmarks.moe import GPU_COMMAND, Shape, main, roofline, shrink
from model.experts import BACKENDS


def test_every_back_end_is_measured_and_agrees(capsys):
    small = {"width": 32, "inner": 16, "experts": 6, "tokens": 40, "top-k": 2, "repeats": 2}
    main(["--json", *(f"--{name}={value}" for name, value in small.items())])
    result = json.loads(capsys.readouterr().out)
    assert set(result["median_seconds"]) == set(BACKENDS)
    assert all(seconds > 0 for seconds in result["median_seconds"].values())
    assert set(result["ours_is_faster_by"]) == {"eager", "grouped_mm"}
    assert all(error < 1e-5 for error in result["largest_difference_to_eager"].values())
    assert result["shape_is"].startswith("scaled")
    assert result["roofline"] is None
    assert result["on_a_gpu"] == GPU_COMMAND


def test_a_layer_too_large_loses_experts_and_nothing_else():
    whole = Shape()
    assert shrink(whole, 4 * whole.weights * 4, 4) == whole
    assert shrink(whole, 4 * whole.weights * 4 - 1, 4) == Shape(experts=64)


def test_roofline_is_the_slower_of_flops_and_memory():
    many, few = Shape(tokens=65_536), Shape(tokens=64)
    # Three products of forward, six of backward, two operations each.
    assert many.flops == 3 * 6 * 65_536 * 8 * 768 * 2048
    found = roofline(many, {"ours": 1.0}, "NVIDIA H100 80GB HBM3")
    assert found["share_of_roofline"]["ours"] == pytest.approx(many.flops / 989.4e12)
    found = roofline(few, {"ours": 1.0}, "NVIDIA H100 80GB HBM3")
    assert found["share_of_roofline"]["ours"] == pytest.approx(6 * few.weights / 3.35e12)
    assert found["share_of_peak_flops"]["ours"] == pytest.approx(few.flops / 989.4e12)
    assert roofline(few, {"ours": 1.0}, "a card of next year") is None
