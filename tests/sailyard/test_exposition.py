"""A scraper sees the newest figures of a running stage, and nothing once it has ended."""

from __future__ import annotations

import httpx
import pytest

from sailyard.stage.exposition import Exposition


def test_the_newest_point_of_each_series_is_shown() -> None:
    exposition = Exposition(0, "alignment.warmup", "run-1")
    url = f"http://127.0.0.1:{exposition.port}/metrics"
    exposition.metric({"loss": 2.0, "lr": 1e-3})
    exposition.metric({"loss": 1.5})
    exposition.progress(3, 10)
    lines = httpx.get(url, trust_env=False).text.splitlines()
    labels = 'run="run-1",stage="alignment.warmup"'
    assert f'sailyard_metric{{name="loss",{labels}}} 1.5' in lines
    assert f'sailyard_metric{{name="lr",{labels}}} 0.001' in lines
    assert f"sailyard_step{{{labels}}} 3.0" in lines
    assert f"sailyard_steps_total{{{labels}}} 10.0" in lines
    exposition.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)


def test_a_port_that_is_taken_is_an_error() -> None:
    first = Exposition(0, "a.b", "run")
    with pytest.raises(OSError, match="in use"):
        Exposition(first.port, "a.b", "run")
    first.close()
