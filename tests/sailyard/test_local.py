"""Stages as subprocesses: the graph, its second run, and being stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partialmethod
from pathlib import Path

import pytest

from sailyard.lineage import queries
from sailyard.local import GraphObserver, StageProcess, run_graph
from sailyard.pipeline import Pipeline
from sailyard.processes import descendants
from sailyard.runs import Run, create_run, load_run, stage_result
from sailyard.stage import EXIT_RESUME
from sailyard.yard import Yard

ROOT = Path(__file__).parents[2]

# These two need no model, so a process of either takes a second.
STAGES = ("curation.text", "curation.heldout")
FEW = ("world.num_text=20", "world.heldout_per_skill=1")

pytestmark = pytest.mark.slow


def short_run(yard: Yard, *overrides: str, stages: tuple[str, ...] = STAGES) -> Run:
    """A run whose graph is cut down to a few stages; their processes see the whole graph."""
    run = load_run(create_run("micro", [*FEW, *overrides], yard=yard), yard)
    cut = Pipeline([stage for stage in run.pipeline.stages if stage.name in stages])
    run.__dict__["pipeline"] = cut
    return run


def test_the_graph_runs_in_processes_and_then_from_the_cache() -> None:
    yard = Yard()
    lines: list[str] = []
    started: list[str] = []
    observer = GraphObserver(started=started.append, line=lambda stage, line: lines.append(line))
    first = run_graph(yard, short_run(yard), jobs=2, observer=observer)
    assert sorted(end.stage for end in first) == sorted(STAGES)
    assert {(end.code, end.cached) for end in first} == {(0, False)}
    assert sorted(started) == sorted(STAGES)
    assert any("curation.text: finished after" in line for line in lines)
    run = short_run(yard)
    second = run_graph(yard, run)
    assert {(end.code, end.cached) for end in second} == {(0, True)}
    rows = queries.stage_runs(yard.database, run.id)
    assert [row.cached for row in rows] == [True, True]


def test_no_stage_starts_after_one_that_failed() -> None:
    yard = Yard()
    run = short_run(yard)
    # A disk that is full for the stage's process: nothing can be written below home/work.
    yard.settings.home.mkdir(parents=True, exist_ok=True)
    (yard.settings.home / "work").write_text("in the way")
    ends = run_graph(yard, run)
    assert [(end.stage, end.code) for end in ends] == [("curation.heldout", 1)]
    (yard.settings.home / "work").unlink()
    again = run_graph(yard, run)
    assert {end.code for end in again} == {0}
    assert len(again) == 2


def test_jobs_below_one_are_refused() -> None:
    yard = Yard()
    with pytest.raises(ValueError, match="at least one stage must be able to run"):
        run_graph(yard, short_run(yard), jobs=0)


def wait_for(path_or_pid: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while Path(f"/proc/{path_or_pid}").exists():
        assert time.monotonic() < deadline, f"process {path_or_pid} lives on"
        time.sleep(0.05)


def test_cancelling_ends_every_process_and_the_stage_can_be_run_again() -> None:
    yard = Yard()
    run = short_run(yard, "world.num_text=3000000")
    process = StageProcess(run.id, "curation.text", settings=yard.settings)
    for line in process.lines():
        if "started" in line:
            break
    family = [process.process.pid, *descendants(process.process.pid)]
    assert len(family) == 2  # the supervisor and the stage
    assert process.cancel(grace_seconds=120) == EXIT_RESUME
    for pid in family:
        wait_for(pid)
    result = stage_result(run.id, "curation.text", yard)
    assert result is not None
    assert result.status == "stopped"
    assert yard.store.list("stages/") == []


def test_a_stage_that_does_not_stop_is_killed_with_all_it_started() -> None:
    yard = Yard()
    run = short_run(yard, "world.num_text=3000000")
    process = StageProcess(run.id, "curation.text", settings=yard.settings)
    for line in process.lines():
        if "started" in line:
            break
    family = [process.process.pid, *descendants(process.process.pid)]
    for pid in family[1:]:
        os.kill(pid, signal.SIGSTOP)  # as if it hung
    assert process.cancel(grace_seconds=0.5) == -signal.SIGKILL
    for pid in family:
        wait_for(pid)


def test_interrupting_the_graph_stops_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a busy machine the usual grace is short, and what is killed does not say "stopped".
    monkeypatch.setattr(StageProcess, "cancel", partialmethod(StageProcess.cancel, 120))
    yard = Yard()
    run = short_run(yard, "world.num_text=3000000", stages=("curation.text",))
    begun = threading.Event()
    observer = GraphObserver(line=lambda stage, line: begun.set())
    others = descendants(os.getpid())  # servers that other tests keep

    def interrupt() -> None:
        begun.wait(250)
        os.kill(os.getpid(), signal.SIGINT)

    # A shell starts background jobs with SIGINT ignored, and Python leaves that as it is.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            run_graph(yard, run, observer=observer)
    finally:
        signal.signal(signal.SIGINT, before)
    assert set(descendants(os.getpid())) <= set(others)
    result = stage_result(run.id, "curation.text", yard)
    assert result is not None
    assert result.status == "stopped"


def test_a_runner_told_to_end_stops_its_stages() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "sailyard", "run", "--recipe", "micro"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "started (" in line:
            break
    while not (family := descendants(process.pid)):  # between two stages there is none
        time.sleep(0.05)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "go on with: sailyard run --resume" in output
    for pid in family:
        wait_for(pid)
