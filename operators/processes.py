"""Long-lived processes that one command starts and, whatever happens, ends.

Each service runs in a session of its own, so one signal reaches it and all it started. Airflow's
tasks and the stages below them open further sessions; those are found by a marker that every
process of the yard inherits in its environment.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

MARKER = "SAILYARD_DEMO_HOME"
"""Environment variable that names the home whose demo started a process."""

PORTS = range(20000, 32000)
"""Where free ports are looked for."""


class ServiceDied(RuntimeError):
    """A service ended by itself; the message holds the end of its log."""


@dataclass(frozen=True)
class Service:
    """One running service and where its output goes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


class Services:
    """The services of one home. ``stop`` leaves none of them, nor anything they started."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._services: list[Service] = []

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> Service:
        """Start a service; its output is appended to ``log``."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as sink:
            process = subprocess.Popen(
                command,
                env={**environment, MARKER: str(self._home)},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        service = Service(name, process, log)
        self._services.append(service)
        return service

    def check(self) -> None:
        """Raise ``ServiceDied`` when a service is no longer there."""
        for service in self._services:
            code = service.process.poll()
            if code is not None:
                raise ServiceDied(
                    f"{service.name} ended by itself with status {code}; the end of "
                    f"{service.log}:\n{tail(service.log)}"
                )

    def stop(self, grace_s: float = 20.0) -> None:
        """End every service, by force after ``grace_s``, and whatever else still runs."""
        self._end(self._services, grace_s)
        end_processes(marked_processes(self._home), grace_s=2.0)

    def stop_one(self, service: Service, grace_s: float) -> None:
        """End one service before the others."""
        self._end([service], grace_s)

    def _end(self, services: Sequence[Service], grace_s: float) -> None:
        for service in services:
            _signal_group(service.process.pid, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        for service in services:
            with suppress(subprocess.TimeoutExpired):
                service.process.wait(max(0.0, deadline - time.monotonic()))
        for service in services:
            _signal_group(service.process.pid, signal.SIGKILL)
            service.process.wait()
        self._services = [service for service in self._services if service not in services]


def marked_processes(home: Path) -> list[psutil.Process]:
    """Every process that a demo on ``home`` started, directly or not, and that still runs."""
    found = []
    for process in psutil.process_iter():
        # A process of another user, or one that has just ended, is none of ours.
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARKER) == str(home):
                found.append(process)
    return found


def end_processes(processes: Iterable[psutil.Process], grace_s: float) -> None:
    """SIGTERM, and SIGKILL for those still there after ``grace_s`` seconds."""
    left = list(processes)
    for send in (psutil.Process.terminate, psutil.Process.kill):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                send(process)
        left = psutil.wait_procs(left, timeout=grace_s)[1]


def free_ports(count: int) -> list[int]:
    """``count`` different loopback ports that nothing listens on now.

    None is of the range that systems give to outgoing connections (from 32768, or 49152): a
    service may bind its port minutes later, and until then any connection could take it.
    """
    with ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            port = secrets.choice(PORTS)
            with suppress(OSError):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                ports.append(port)
        return ports


def tail(log: Path, num_lines: int = 25) -> str:
    """The last lines of a log, as text."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return "\n".join(text.splitlines()[-num_lines:])


def _signal_group(leader: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)
