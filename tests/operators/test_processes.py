"""Services end with whoever started them, and so does everything they started."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from operators.processes import ServiceDied, Services, free_ports, marked_processes, tail

WITH_RUNAWAY = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("ready", flush=True)
time.sleep(600)
"""


def wait_for(log: Path, word: str) -> None:
    deadline = time.monotonic() + 120
    while word not in tail(log):
        assert time.monotonic() < deadline, f"no {word!r} in {log}"
        time.sleep(0.02)


def test_stop_ends_services_and_what_they_started(tmp_path: Path) -> None:
    services = Services(tmp_path)
    log = tmp_path / "logs" / "one.log"
    services.start("one", [sys.executable, "-c", WITH_RUNAWAY], dict(os.environ), log)
    wait_for(log, "ready")
    services.check()
    assert len(marked_processes(tmp_path)) == 2
    services.stop(grace_s=2.0)
    assert marked_processes(tmp_path) == []


def test_a_service_that_ignores_the_request_is_killed(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('on'); time.sleep(600)"
    services = Services(tmp_path)
    log = tmp_path / "deaf.log"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    services.start("deaf", [sys.executable, "-c", code], environment, log)
    wait_for(log, "on")
    services.stop(grace_s=0.2)
    assert marked_processes(tmp_path) == []


def test_check_names_the_service_that_died_and_shows_its_log(tmp_path: Path) -> None:
    services = Services(tmp_path)
    code = "import sys; sys.exit('no such database')"
    service = services.start(
        "board", [sys.executable, "-c", code], dict(os.environ), tmp_path / "board.log"
    )
    service.process.wait()
    with pytest.raises(ServiceDied, match=r"board ended by itself with status 1(.|\n)*no such"):
        services.check()
    services.stop()


def test_another_homes_processes_are_left_alone(tmp_path: Path) -> None:
    mine, other = Services(tmp_path / "mine"), Services(tmp_path / "other")
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    service = other.start("other", sleep, dict(os.environ), tmp_path / "other.log")
    mine.stop()
    assert service.process.poll() is None
    other.stop()
    assert service.process.poll() is not None


def test_free_ports_differ() -> None:
    assert len(set(free_ports(4))) == 4
