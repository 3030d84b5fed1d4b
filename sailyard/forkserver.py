"""A process that has the slow imports behind it and forks stages, for many short ones in a row.

Importing torch and transformers takes seconds of a core. A pod pays them once for hours of work; a
pipeline of forty short stages on one machine pays them forty times. Here one process imports what
stages need, starts no thread and opens nothing, and each stage is a fork of it that then runs the
command line like a process of its own: own session, environment, folder and output.

On the wire, over a Unix socket that only its owner may open: the client sends the length of a JSON
request with the output's descriptor, then the request; the server answers with the process id and,
when it has ended, with the exit code.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

NUMBER = struct.Struct("!q")
MAX_REQUEST = 1 << 20
"""Bytes of a request: arguments and environment."""


class ForkServerError(RuntimeError):
    """The server went away, or refused, before the process was there."""


class ForkedProcess:
    """A ``sailyard`` command forked by a server; what callers need of ``subprocess.Popen``.

    Attributes:
        pid: Its process id, also that of its process group.
        stdout: Its output and errors; ends when all that hold them have ended.
        returncode: None until it has ended; negative for a signal. A server that was killed
            cannot tell: -SIGKILL.
    """

    def __init__(
        self, server: Path, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        """Start it in the current folder.

        Raises:
            OSError: Nobody listens at ``server``.
            ForkServerError: The server did not start the process.
        """
        request = json.dumps(
            {"arguments": arguments, "environment": environment, "directory": os.getcwd()}
        ).encode()
        if len(request) > MAX_REQUEST:
            raise ForkServerError(f"a request of {len(request)} bytes; {MAX_REQUEST} are allowed")
        self.returncode: int | None = None
        self._ended = threading.Event()
        self._connection = socket.socket(socket.AF_UNIX)
        read, write = os.pipe()
        try:
            self._connection.connect(str(server))
            socket.send_fds(self._connection, [NUMBER.pack(len(request))], [write])
            self._connection.sendall(request)
            self.pid = _receive_number(self._connection)
        except BaseException:
            os.close(read)
            self._connection.close()
            raise
        finally:
            os.close(write)
        self.stdout = os.fdopen(read, "rb")
        threading.Thread(target=self._await_end, daemon=True).start()

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended; ``subprocess.TimeoutExpired`` if that takes longer."""
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def terminate(self) -> None:
        """Send SIGTERM, unless it has ended: the number may be another's by then."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGTERM)

    def _await_end(self) -> None:
        with self._connection:
            try:
                self.returncode = _receive_number(self._connection)
            except (ForkServerError, OSError):
                self.returncode = -signal.SIGKILL
        self._ended.set()


def serve(path: Path, modules: Sequence[str]) -> NoReturn:
    """Import ``modules``, then fork a process for every request at the socket ``path``, for ever.

    Raises:
        RuntimeError: An import started a thread; what it holds in a fork is held for ever.
    """
    for module in modules:
        importlib.import_module(module)
    # Native threads are another matter: OpenBLAS and Arrow see to theirs when a process forks.
    if threading.active_count() > 1:
        raise RuntimeError(f"threads run after the imports: {threading.enumerate()}")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the minders
    with socket.socket(socket.AF_UNIX) as listener:
        mask = os.umask(0o077)
        # Under its own name only once it listens: who sees it may connect.
        early = path.with_name(f"{path.name}~")
        listener.bind(str(early))
        os.umask(mask)
        listener.listen()
        early.rename(path)
        while True:
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    listener.close()
                    _mind(connection)


def _mind(connection: socket.socket) -> NoReturn:
    """Fork the process of one request, tell its number and, when it has ended, its code."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        head, (output, *_), _, _ = socket.recv_fds(connection, NUMBER.size, 1)
        (length,) = NUMBER.unpack(head)
        request = json.loads(_receive(connection, min(length, MAX_REQUEST)))
        child = os.fork()
        if child == 0:
            connection.close()
            _become(request["arguments"], request["environment"], request["directory"], output)
        os.close(output)
        connection.sendall(NUMBER.pack(child))
        _, status = os.waitpid(child, 0)
        connection.sendall(NUMBER.pack(os.waitstatus_to_exitcode(status)))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _become(
    arguments: Sequence[str], environment: Mapping[str, str], directory: str, output: int
) -> NoReturn:
    """Be ``python -m sailyard *arguments`` as if it had been started afresh."""
    code = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        for given, standard in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(given, standard)
        os.closerange(3, max(nothing, output) + 1)
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["sailyard", *arguments]
        runpy.run_module("sailyard", run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _receive_number(connection: socket.socket) -> int:
    (number,) = NUMBER.unpack(_receive(connection, NUMBER.size))
    return int(number)


def _receive(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise ForkServerError("the fork server hung up")
        data += piece
    return data


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2:])
