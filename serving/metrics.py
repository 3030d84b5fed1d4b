"""Prometheus figures of one server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from serving.versions import Versions

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """All series, in a registry of their own so that two servers fit into one process."""

    def __init__(self, versions: Versions) -> None:
        self.registry = CollectorRegistry()
        self._versions = versions

        def counter(name: str, doc: str, *labels: str) -> Counter:
            return Counter(f"sailyard_serving_{name}", doc, labels, registry=self.registry)

        def seconds(name: str, doc: str) -> Histogram:
            return Histogram(
                f"sailyard_serving_{name}", doc, buckets=_SECONDS, registry=self.registry
            )

        def gauge(name: str, doc: str, *labels: str) -> Gauge:
            return Gauge(f"sailyard_serving_{name}", doc, labels, registry=self.registry)

        self.requests = counter("requests", "Chat requests by HTTP status", "status")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens read, images included")
        self.completion_tokens = counter("completion_tokens", "Tokens written")
        self.reloads = counter("reloads", "Version switches by outcome", "outcome")
        self.request_seconds = seconds("request_seconds", "From request to the end of its reply")
        self.first_token_seconds = seconds(
            "first_token_seconds", "From request to the first token of its reply"
        )
        gauge("running", "Replies being written").set_function(
            lambda: self._engine_count("num_running")
        )
        gauge("waiting", "Requests waiting for a place in the batch").set_function(
            lambda: self._engine_count("num_waiting")
        )
        self._version = gauge("version", "1 for the served version", "model", "digest")
        versions.on_reload = self._reloaded

    def _engine_count(self, name: str) -> float:
        served = self._versions.current
        return float(getattr(served.engine, name)) if served else 0.0

    def _reloaded(self, ok: bool) -> None:
        self.reloads.labels("ok" if ok else "failed").inc()
        served = self._versions.current
        if ok and served is not None:
            self._version.clear()
            self._version.labels(served.name, served.digest).set(1)
