"""Stages forked from a process that has the imports behind it."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sailyard import local
from sailyard.forkserver import ForkedProcess, ForkServerError
from sailyard.local import StageProcess
from sailyard.processes import descendants
from sailyard.runs import create_run, stage_result
from sailyard.stage import EXIT_RESUME
from sailyard.yard import Yard

FEW = ("world.num_text=20", "world.heldout_per_skill=1")


@pytest.fixture(scope="module")
def server() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fork"
        process = subprocess.Popen(
            [sys.executable, "-m", "sailyard.forkserver", str(path), "curation.world.build"]
        )
        deadline = time.monotonic() + 240
        while not path.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield path
        process.kill()
        process.wait()


@pytest.fixture
def offered(server: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(local.FORK_SERVER, str(server))
    return server


def test_only_its_owner_may_open_the_socket(server: Path) -> None:
    assert stat.S_IMODE(server.stat().st_mode) & 0o077 == 0


def test_a_forked_stage_ends_as_any_other(offered: Path) -> None:
    yard = Yard()
    run = create_run("micro", [*FEW], yard=yard)
    process = StageProcess(run, "curation.text", settings=yard.settings)
    assert isinstance(process.process, ForkedProcess)
    lines = list(process.lines())
    assert process.wait() == 0
    assert any("curation.text: finished after" in line for line in lines)
    assert stage_result(run, "curation.text", yard).finished  # type: ignore[union-attr]


def test_it_has_the_callers_folder_and_a_wrong_command_line_its_code(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("base: micro\nworld: {num_text: nonsense}\n")
    process = ForkedProcess(server, ["stage", "list", "--recipe", "mine.yaml"], os.environ.copy())
    output = process.stdout.read().decode()
    assert (process.wait(), "nonsense" in output) == (1, True), output
    process = ForkedProcess(server, ["stage", "nonsense"], os.environ.copy())
    assert "nonsense" in process.stdout.read().decode()
    assert process.wait() == 2


def test_cancelling_ends_the_whole_family(offered: Path) -> None:
    yard = Yard()
    run = create_run("micro", ["world.num_text=3000000"], yard=yard)
    process = StageProcess(run, "curation.text", settings=yard.settings)
    assert any("started" in line for line in process.lines())
    leader = process.process.pid
    assert os.getsid(leader) == leader
    family = [leader, *descendants(leader)]
    assert len(family) == 2  # the supervisor and the stage
    assert process.cancel(grace_seconds=120) == EXIT_RESUME
    assert not any(Path(f"/proc/{pid}").exists() for pid in family)


def test_a_signal_shows_as_a_negative_code(offered: Path) -> None:
    yard = Yard()
    run = create_run("micro", ["world.num_text=3000000"], yard=yard)
    process = StageProcess(run, "curation.text", settings=yard.settings)
    assert any("started" in line for line in process.lines())
    (stage,) = descendants(process.process.pid)
    os.kill(stage, signal.SIGKILL)
    threading.Thread(target=lambda: list(process.lines()), daemon=True).start()
    assert process.wait() == -signal.SIGKILL


def test_a_server_that_dies_loses_its_stages_and_says_so(tmp_path: Path) -> None:
    path = Path(tempfile.mkdtemp(dir="/tmp")) / "fork"
    own = subprocess.Popen(
        [sys.executable, "-m", "sailyard.forkserver", str(path)], start_new_session=True
    )
    while not path.exists():
        time.sleep(0.05)
    environment = {**os.environ, "SAILYARD_HOME": str(tmp_path)}
    process = ForkedProcess(path, ["stage", "list"], environment)
    os.killpg(own.pid, signal.SIGKILL)
    own.wait()
    assert process.wait(120) in (0, -signal.SIGKILL)  # it may have ended before
    with pytest.raises((OSError, ForkServerError)):
        ForkedProcess(path, ["stage", "list"], environment)


def test_without_a_server_the_stage_still_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(local.FORK_SERVER, str(tmp_path / "nobody"))
    yard = Yard()
    run = create_run("micro", [*FEW], yard=yard)
    process = StageProcess(run, "curation.text", settings=yard.settings)
    assert isinstance(process.process, subprocess.Popen)
    list(process.lines())
    assert process.wait() == 0
