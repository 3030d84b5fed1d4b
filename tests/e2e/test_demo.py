"""``make demo`` on the smallest recipe: interrupted, then to its end, then from the cache.

One home for all: the tests run in this order and each builds on what the one before left.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from operators.processes import marked_processes
from sailyard.lineage import queries
from sailyard.pipeline import build_pipeline
from sailyard.recipe import load_recipe
from sailyard.report import build_report
from sailyard.settings import Settings
from sailyard.yard import Yard

pytestmark = [pytest.mark.slow, pytest.mark.airflow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
DEMO = [sys.executable, "-m", "operators.demo", "--recipe", "micro"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / ".sailyard"


def start(home: Path, *arguments: str) -> tuple[subprocess.Popen[bytes], Path]:
    """A demo in a session of its own, and the file that its output goes to."""
    output = home.parent / f"output-{time.monotonic_ns()}"
    with output.open("wb") as sink:
        process = subprocess.Popen(
            [*DEMO, *arguments],
            env={**os.environ, "SAILYARD_HOME": str(home)},
            cwd=ROOT,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Tests started in the background inherit that SIGINT is ignored; a terminal's do not.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    return process, output


def wait_for_line(process: subprocess.Popen[bytes], output: Path, pattern: str) -> None:
    while not re.search(pattern, output.read_text(), re.MULTILINE):
        assert process.poll() is None, output.read_text()
        time.sleep(0.2)


def finish(home: Path) -> str:
    """Run a demo to its end; returns its output."""
    process, output = start(home, "--exit")
    code = process.wait()
    text = output.read_text()
    assert code == 0, text
    assert marked_processes(home) == []
    return text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_demo_leaves_nothing_running(home: Path, number: signal.Signals) -> None:
    process, output = start(home, "--exit")
    wait_for_line(process, output, r"^\[.*\] curation\.ingest: ")
    second, refusal = start(home, "--exit")
    assert second.wait() == 1
    assert "another demo runs on" in refusal.read_text()
    process.send_signal(number)
    assert process.wait(240) == 130
    assert marked_processes(home) == []


def test_the_whole_pipeline_under_airflow(home: Path) -> None:
    text = finish(home)
    yard = Yard(Settings(home=home))
    report = build_report(yard)
    expected = {stage.name for stage in build_pipeline(load_recipe("micro")).stages}
    assert {stage["name"] for stage in report["stages"]} == expected
    assert {stage["status"] for stage in report["stages"]} == {"finished"}
    assert yard.registry.current("production") is not None
    for url in ("Airflow ", "Board ", "Endpoint "):
        assert re.search(rf"^{url} *http://127\.0\.0\.1:\d+", text, re.MULTILINE)


def test_a_second_demo_reuses_every_stage(home: Path) -> None:
    started = time.monotonic()
    finish(home)
    seconds = time.monotonic() - started
    yard = Yard(Settings(home=home))
    latest = queries.latest_run(yard.database)
    assert latest is not None
    stages = build_report(yard, latest.id)["stages"]
    assert all(stage["cached"] for stage in stages), stages
    print(f"second demo: {seconds:.0f} s")


def test_wrong_input_is_refused_before_anything_starts(tmp_path: Path) -> None:
    home = tmp_path / "unused"
    process, output = start(home, "--set", "alignment.warmup.lrr=1")
    assert process.wait() == 2
    assert "alignment.warmup.lr" in output.read_text()
    process, output = start(home, "--data", str(tmp_path / "nowhere"))
    assert process.wait() == 2
    assert "nowhere" in output.read_text()
    assert not home.exists()
