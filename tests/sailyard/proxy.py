"""A TCP proxy that loses connections on demand, to stand between a client and a real server."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from types import TracebackType


class Proxy:
    """Forwards bytes to a server until told to break.

    Attributes:
        cut_downloads: Byte counts; each next connection is cut once the server has sent that
            many bytes through it.
        cut_uploads: The same for bytes that the client sent.
        swallow_answers: So many of the next answers are dropped whole, after the server got
            the request and acted on it.
        num_connections: How many connections came in.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut_downloads: list[int] = []
        self.cut_uploads: list[int] = []
        self.swallow_answers = 0
        self.num_connections = 0
        self._open: list[socket.socket] = []

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Refuse new connections and break those that are open."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            _break(connection)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            server = socket.create_connection(self._target)
            self._open += [client, server]
            down = self.cut_downloads.pop(0) if self.cut_downloads else None
            up = self.cut_uploads.pop(0) if self.cut_uploads else None
            self._pump(client, server, up, lambda: False)
            self._pump(server, client, down, self._swallow)

    def _swallow(self) -> bool:
        if self.swallow_answers:
            self.swallow_answers -= 1
            return True
        return False

    def _pump(
        self,
        source: socket.socket,
        sink: socket.socket,
        limit: int | None,
        swallow: Callable[[], bool],
    ) -> None:
        def run() -> None:
            passed = 0
            with contextlib.suppress(OSError):
                while chunk := source.recv(65536):
                    if swallow():
                        break
                    if limit is not None and passed + len(chunk) >= limit:
                        sink.sendall(chunk[: limit - passed])
                        break
                    sink.sendall(chunk)
                    passed += len(chunk)
            _break(source)
            _break(sink)

        threading.Thread(target=run, daemon=True).start()


def _break(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
