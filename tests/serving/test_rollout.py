"""The rollout against a registry of its own and a server that answers as the API does.

What a real cluster does with what it asks for is tests/cluster's business.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from sailyard.cluster import ClusterSettings
from sailyard.lineage import queries
from sailyard.yard import Yard
from serving import rollout
from serving.rollout import VERSION_VARIABLE, Rollout, RolloutSettings, progress

JSON = dict[str, Any]


class Endpoint:
    """A Deployment, its pods, and what they say on /ready."""

    def __init__(self) -> None:
        self.generation, self.digest, self.ref = 1, "", ""
        self.ready, self.updated, self.observed = 1, 1, 1
        self.expired = False
        self.says: JSON = {"ready": True, "digest": None, "error": None, "rejected": False}
        self.failures = 0  # requests that are answered 503 before one goes well
        self.used: set[tuple[str, str, str]] = set()

    def pin(self, body: JSON) -> None:
        template = body["spec"]["template"]
        (container,) = template["spec"]["containers"]
        assert container["name"] == "endpoint"
        (variable,) = container["env"]
        self.digest, self.ref = variable["value"], template["metadata"]["annotations"].popitem()[1]
        self.generation += 1
        self.updated = self.ready = 0

    def finish(self) -> None:
        self.observed, self.updated, self.ready = self.generation, 1, 1
        self.says = {"ready": True, "digest": self.digest, "error": None, "rejected": False}

    def reject(self, error: str) -> None:
        self.observed = self.generation
        self.says = {"ready": False, "digest": self.digest, "error": error, "rejected": True}

    def deployment(self) -> JSON:
        env = [{"name": VERSION_VARIABLE, "value": self.digest}] if self.digest else []
        reason = "ProgressDeadlineExceeded" if self.expired else "ReplicaSetUpdated"
        labels = {"app": "endpoint"}
        return {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "endpoint", "generation": self.generation},
            "spec": {
                "replicas": 1,
                "progressDeadlineSeconds": 900,
                "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {"containers": [{"name": "endpoint", "image": "x", "env": env}]},
                },
            },
            "status": {
                "observedGeneration": self.observed,
                "replicas": 1,
                "updatedReplicas": self.updated,
                "readyReplicas": self.ready,
                "conditions": [{"type": "Progressing", "status": "True", "reason": reason}],
            },
        }


class Handler(BaseHTTPRequestHandler):
    endpoint: Endpoint

    def do_GET(self) -> None:
        if self.path == "/ready":
            self._answer(200 if self.endpoint.says["ready"] else 503, self.endpoint.says)
        elif self._is_up() and "/deployments/" in self.path:
            self.endpoint.used.add(("apps", "deployments", "get"))
            self._answer(200, self.endpoint.deployment())
        elif "/pods" in self.path:
            self.endpoint.used.add(("", "pods", "list"))
            assert "labelSelector=app%3Dendpoint" in self.path
            pod = {"metadata": {"name": "endpoint-1"}, "status": {"podIP": "127.0.0.1"}}
            self._answer(200, {"apiVersion": "v1", "kind": "PodList", "items": [pod]})

    def do_PATCH(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.endpoint.used.add(("apps", "deployments", "patch"))
        assert "strategic-merge-patch" in self.headers["Content-Type"]
        assert "fieldManager=sailyard-rollout" in self.path
        self.endpoint.pin(body)
        self._answer(200, self.endpoint.deployment())

    def _is_up(self) -> bool:
        if self.endpoint.failures == 0:
            return True
        self.endpoint.failures -= 1
        self._answer(503, {"message": "etcd is away"})
        return False

    def _answer(self, status: int, body: JSON) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    found = Endpoint()
    handler = type("Bound", (Handler,), {"endpoint": found})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port
        config = tmp_path / "kubeconfig"
        here = {"cluster": {"server": f"http://127.0.0.1:{port}"}, "name": "here"}
        context = {"context": {"cluster": "here", "user": "me"}, "name": "here"}
        config.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [here],
                    "users": [{"name": "me", "user": {}}],
                    "contexts": [context],
                    "current-context": "here",
                }
            )
        )
        monkeypatch.setenv("KUBECONFIG", str(config))
        monkeypatch.setattr(rollout, "PORT", port)
        # A pod that is slow to answer is passed over; the tests' own must not be.
        monkeypatch.setattr(rollout, "_PROBE_SECONDS", 120.0)
        yield found
        server.shutdown()


@pytest.fixture
def yard(isolated_home: Path) -> Yard:
    yard = Yard()
    for digest in ("a" * 64, "b" * 64, "c" * 64):
        yard.registry.register("tiny", digest, run_id="run-1")
    return yard


@pytest.fixture
def follower(endpoint: Endpoint, yard: Yard) -> Rollout:
    return Rollout(RolloutSettings(deployment="endpoint"), ClusterSettings(), yard)


def roll(follower: Rollout, endpoint: Endpoint) -> None:
    follower.step()
    endpoint.finish()
    follower.step()


def test_the_deployment_follows_the_alias(
    follower: Rollout, endpoint: Endpoint, yard: Yard
) -> None:
    follower.step()
    assert endpoint.digest == "", "nothing is promoted, nothing is touched"
    yard.registry.promote("production", "tiny:1")
    roll(follower, endpoint)
    assert (endpoint.digest, endpoint.ref) == ("a" * 64, "tiny:1")
    yard.registry.promote("production", "tiny:2")
    roll(follower, endpoint)
    assert endpoint.digest == "b" * 64
    yard.registry.rollback("production")
    roll(follower, endpoint)
    assert endpoint.digest == "a" * 64
    generation = endpoint.generation
    follower.step()
    assert endpoint.generation == generation, "what is done is left alone"


def test_a_version_that_its_pods_reject_loses_the_alias_to_the_one_before(
    follower: Rollout, endpoint: Endpoint, yard: Yard
) -> None:
    yard.registry.promote("production", "tiny:1")
    roll(follower, endpoint)
    yard.registry.promote("production", "tiny:2", actor="ann")
    follower.step()
    endpoint.reject("tiny:2 failed its smoke test: colour-0")
    follower.step()
    assert yard.registry.current("production").ref == "tiny:1"
    newest = yard.registry.promotions("production")[0]
    assert (newest.action, newest.actor) == ("rollback", "rollout")
    assert "colour-0" in newest.reason
    follower.step()
    assert endpoint.digest == "a" * 64
    kinds = [event.kind for event in queries.events(yard.database)]
    assert "rollout failed" in kinds


def test_pods_that_are_not_ready_in_time_are_a_failure_with_their_reason(
    follower: Rollout, endpoint: Endpoint, yard: Yard
) -> None:
    yard.registry.promote("production", "tiny:1")
    roll(follower, endpoint)
    yard.registry.promote("production", "tiny:2")
    follower.step()
    endpoint.observed = endpoint.generation
    endpoint.says = {"ready": False, "digest": None, "error": "no such object", "rejected": False}
    follower.step()
    assert yard.registry.current("production").ref == "tiny:2", "there is time left"
    endpoint.expired = True
    follower.step()
    assert yard.registry.current("production").ref == "tiny:1"
    assert "900 s: no such object" in yard.registry.promotions()[0].reason


def test_a_deadline_of_the_version_before_is_not_this_ones(endpoint: Endpoint) -> None:
    endpoint.expired, endpoint.generation, endpoint.observed = True, 2, 1

    class Shaped:
        """The JSON as the client's objects have it."""

        def __init__(self, body: JSON) -> None:
            self.body = body

        def __getattr__(self, name: str) -> Any:
            head, *tail = name.split("_")
            value = self.body.get(head + "".join(part.title() for part in tail))
            if isinstance(value, dict):
                return Shaped(value)
            if isinstance(value, list):
                return [Shaped(item) for item in value]
            return value

    assert not progress(Shaped(endpoint.deployment())).expired


def test_a_first_version_that_fails_has_nothing_to_go_back_to(
    follower: Rollout, endpoint: Endpoint, yard: Yard
) -> None:
    yard.registry.promote("production", "tiny:1")
    follower.step()
    endpoint.reject("no")
    follower.step()
    follower.step()
    assert yard.registry.current("production").ref == "tiny:1"
    events = [e for e in queries.events(yard.database) if e.kind == "rollout failed"]
    assert len(events) == 1, "told once"


def test_who_promotes_another_version_meanwhile_wins(
    follower: Rollout, endpoint: Endpoint, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    yard.registry.promote("production", "tiny:1")
    roll(follower, endpoint)
    yard.registry.promote("production", "tiny:2")
    follower.step()
    endpoint.reject("no")
    statuses = follower._statuses

    def promoted_in_between(found: Any) -> list[JSON]:
        told = statuses(found)
        yard.registry.promote("production", "tiny:3")
        return told

    monkeypatch.setattr(follower, "_statuses", promoted_in_between)
    follower.step()
    assert yard.registry.current("production").ref == "tiny:3"


def test_a_restart_goes_on_where_it_was_and_hiccups_are_lived_through(
    follower: Rollout, endpoint: Endpoint, yard: Yard
) -> None:
    yard.registry.promote("production", "tiny:1")
    follower.step()
    again = Rollout(RolloutSettings(deployment="endpoint"), ClusterSettings(), yard)
    endpoint.failures = 2
    endpoint.finish()
    again.step()
    assert endpoint.generation == 2


def test_a_look_that_fails_is_not_the_end(
    follower: Rollout, endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, looks = threading.Event(), []

    def step() -> None:
        looks.append(1)
        if len(looks) == 1:
            raise OSError("the database is away")
        stop.set()

    settings = RolloutSettings(
        deployment="endpoint", poll_seconds=0.01, heartbeat=tmp_path / "alive"
    )
    monkeypatch.setattr(follower, "_settings", settings)
    monkeypatch.setattr(follower, "step", step)
    follower.run(stop)
    assert len(looks) == 2
    assert (tmp_path / "alive").exists()


def test_no_right_is_used_that_is_not_listed_and_none_is_idle(
    follower: Rollout, endpoint: Endpoint, yard: Yard
) -> None:
    yard.registry.promote("production", "tiny:1")
    follower.step()
    endpoint.reject("no")
    follower.step()
    assert endpoint.used == {right[:3] for right in rollout.RIGHTS}
