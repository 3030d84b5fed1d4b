"""A stage's newest figures in Prometheus' text format, for whoever scrapes its pod."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from wsgiref.simple_server import WSGIServer

HOST = "0.0.0.0"
"""Every interface: a scraper is another machine. The figures are read-only, and off by default."""


class Exposition:
    """An HTTP endpoint that lives as long as the stage.

    Gauges: `sailyard_metric{stage,run,name}`, the last point of each series;
    `sailyard_step{stage,run}` and `sailyard_steps_total{stage,run}`.
    """

    def __init__(self, port: int, stage: str, run_id: str) -> None:
        """Args: port: 0 takes a free one; `port` tells which.

        Raises:
            OSError: The port is taken.
        """
        # Here, so that a stage that is not scraped does not need the package.
        from prometheus_client import CollectorRegistry, Gauge, start_http_server

        registry = CollectorRegistry()
        labels = {"stage": stage, "run": run_id}
        names = list(labels)
        self._metrics = Gauge(
            "sailyard_metric", "Last point of a series", [*names, "name"], registry=registry
        )
        step = Gauge("sailyard_step", "Units of work done", names, registry=registry)
        total = Gauge("sailyard_steps_total", "Units of work in all", names, registry=registry)
        self._step, self._total = step.labels(**labels), total.labels(**labels)
        self._labels = labels
        self._server: WSGIServer
        self._thread: threading.Thread
        self._server, self._thread = start_http_server(port, addr=HOST, registry=registry)
        self.port = self._server.server_port

    def metric(self, values: Mapping[str, float]) -> None:
        """Show the newest point of each series."""
        for name, value in values.items():
            self._metrics.labels(**self._labels, name=name).set(value)

    def progress(self, done: int, total: int) -> None:
        """Show how far the stage is."""
        self._step.set(done)
        self._total.set(total)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
