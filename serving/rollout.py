"""``python -m serving.rollout``: keep the endpoint's Deployment at the version of the alias.

Whoever promotes or rolls back (the pipeline, the CLI, the board, the promotion DAG) moves an alias
in the registry and needs no right on the cluster. This process alone has one: it writes the alias's
digest into the Deployment and watches the pods replace each other. New pods take requests only when
they are ready, which a pinned server is after its smoke test; older ones stay until then. A version
that is rejected, or not ready in the Deployment's time, loses the alias to the one before it.

Every look starts from what the registry and the cluster say, so it may be ended at any moment.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from kubernetes import client
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from sailyard.cluster import ClusterSettings, Right
from sailyard.cluster_api import REQUEST_SECONDS, connect, patiently
from sailyard.lineage.records import add_event
from sailyard.registry import ModelVersion, RegistryError
from sailyard.yard import Yard

log = logging.getLogger(__name__)

ACTOR = "rollout"
"""Who moved the alias, in the registry's history, when a version was taken back."""

CONTAINER = "endpoint"
PORT = 8000
VERSION_VARIABLE = "SAILYARD_SERVE_VERSION"
VERSION_ANNOTATION = "sailyard.dev/version"

_PROBE_SECONDS = 5.0
_LONGEST_STATUS = 64 * 1024

RIGHTS = (
    Right("apps", "deployments", "get", "which version its pods serve, and how far they are"),
    Right("apps", "deployments", "patch", "another version is another digest in its template"),
    Right("", "pods", "list", "new pods say themselves why they are not ready"),
)
"""All the rights that a rollout uses; those on Deployments are for the endpoint's alone."""


class RolloutSettings(BaseSettings):
    """Environment variables ``SAILYARD_ROLLOUT_<FIELD>``."""

    model_config = SettingsConfigDict(
        env_prefix="SAILYARD_ROLLOUT_", extra="forbid", use_attribute_docstrings=True
    )

    deployment: str = Field(min_length=1)
    """Name of the endpoint's Deployment, in the namespace of SAILYARD_CLUSTER_NAMESPACE."""

    alias: str = "production"
    """Registry alias that the Deployment follows."""

    poll_seconds: float = Field(5.0, gt=0)
    """How often alias and Deployment are looked at, in seconds."""

    heartbeat: Path | None = None
    """File that is touched after every look, for a liveness probe."""


@dataclass(frozen=True)
class Progress:
    """How far a Deployment is.

    Attributes:
        digest: Checkpoint that its template names, or "".
        done: All of its pods are new and ready.
        expired: It gave up waiting for them.
    """

    digest: str
    done: bool
    expired: bool


class Rollout:
    """Holds one Deployment at one alias."""

    def __init__(
        self, settings: RolloutSettings, cluster: ClusterSettings, yard: Yard | None = None
    ) -> None:
        self._settings, self._namespace = settings, cluster.namespace
        self._yard = yard or Yard()
        api = connect(cluster)
        self._apps, self._core = client.AppsV1Api(api), client.CoreV1Api(api)
        self._told = ""

    def step(self) -> None:
        """Look once, and do what the look asks for."""
        wanted = self._yard.registry.current(self._settings.alias)
        if wanted is None:
            return
        found = self._read()
        now = progress(found)
        if now.digest != wanted.checkpoint:
            self._pin(wanted)
        elif now.done:
            self._tell("rollout finished", wanted)
        elif reason := self._rejection(found, now):
            self._take_back(wanted, reason)

    def run(self, stop: threading.Event) -> None:
        """Look again and again. What goes wrong is told and tried again at the next look."""
        while not stop.is_set():
            try:
                self.step()
            except Exception:
                log.exception("this look failed; the next is in %s s", self._settings.poll_seconds)
            else:
                if self._settings.heartbeat is not None:
                    self._settings.heartbeat.touch()
            stop.wait(self._settings.poll_seconds)

    def _pin(self, wanted: ModelVersion) -> None:
        container = {
            "name": CONTAINER,
            "env": [{"name": VERSION_VARIABLE, "value": wanted.checkpoint}],
        }
        template = {
            "metadata": {"annotations": {VERSION_ANNOTATION: wanted.ref}},
            "spec": {"containers": [container]},
        }
        self._ask(
            lambda: self._apps.patch_namespaced_deployment(
                self._settings.deployment,
                self._namespace,
                {"spec": {"template": template}},
                field_manager="sailyard-rollout",
                _request_timeout=REQUEST_SECONDS,
            )
        )
        self._tell("rollout began", wanted)

    def _rejection(self, found: Any, now: Progress) -> str:
        """Why the new pods will never be ready; "" while they may be."""
        told = [status for status in self._statuses(found) if status.get("digest") == now.digest]
        rejected = [str(status["error"]) for status in told if status.get("rejected")]
        if rejected:
            return rejected[0]
        if not now.expired:
            return ""
        seconds = found.spec.progress_deadline_seconds
        errors = [str(s["error"]) for s in self._statuses(found) if s.get("error")]
        return f"no new pod was ready within {seconds} s: {errors[0] if errors else 'see its log'}"

    def _take_back(self, wanted: ModelVersion, reason: str) -> None:
        alias, registry = self._settings.alias, self._yard.registry
        why = f"{wanted.ref} could not be rolled out: {reason}"
        try:
            registry.rollback(alias, actor=ACTOR, reason=why, only_from=wanted.checkpoint)
        except RegistryError as error:
            # Nothing to go back to: the pods that were there before stay, and say what is missing.
            self._tell("rollout failed", wanted, f"{why}; {error}")
        else:
            self._tell("rollout failed", wanted, why)

    def _statuses(self, found: Any) -> list[dict[str, Any]]:
        """What the Deployment's pods answer to /ready, those that answer."""
        labels = found.spec.selector.match_labels
        listed = self._ask(
            lambda: self._core.list_namespaced_pod(
                self._namespace,
                label_selector=",".join(f"{key}={value}" for key, value in labels.items()),
                _request_timeout=REQUEST_SECONDS,
            )
        )
        return [_ready_status(pod.status.pod_ip) for pod in listed.items if pod.status.pod_ip]

    def _read(self) -> Any:
        return self._ask(
            lambda: self._apps.read_namespaced_deployment(
                self._settings.deployment, self._namespace, _request_timeout=REQUEST_SECONDS
            )
        )

    def _ask(self, call: Callable[[], Any]) -> Any:
        return patiently(call, patience_s=60.0)

    def _tell(self, kind: str, version: ModelVersion, reason: str = "") -> None:
        """Log it and enter it into the lineage, once."""
        text = f"{kind}: {version.ref} ({version.checkpoint[:12]}) {reason}".rstrip()
        if text == self._told:
            return
        log.info("%s", text)
        detail = {"alias": self._settings.alias, "version": version.ref, "reason": reason}
        # A restart finds a finished rollout finished; that is no news.
        if not (kind == "rollout finished" and not self._told):
            add_event(self._yard.database, kind, version.run_id, "", detail)
        self._told = text


def progress(found: Any) -> Progress:
    """How far a Deployment is, by its own account. Args: found: As the API has it."""
    template, status = found.spec.template, found.status
    variables = {
        variable.name: variable.value or ""
        for container in template.spec.containers
        if container.name == CONTAINER
        for variable in container.env or []
    }
    seen = (status.observed_generation or 0) >= found.metadata.generation
    conditions = {c.type: c for c in status.conditions or []}
    moving = conditions.get("Progressing")
    wanted = found.spec.replicas
    updated, ready = status.updated_replicas or 0, status.ready_replicas or 0
    return Progress(
        digest=variables.get(VERSION_VARIABLE, ""),
        done=seen and wanted > 0 and updated == wanted == ready == (status.replicas or 0),
        expired=seen and moving is not None and moving.reason == "ProgressDeadlineExceeded",
    )


def _ready_status(address: str) -> dict[str, Any]:
    host = f"[{address}]" if ":" in address else address
    try:
        with urlopen(f"http://{host}:{PORT}/ready", timeout=_PROBE_SECONDS) as response:
            body = response.read(_LONGEST_STATUS)
    except URLError as error:
        read = getattr(error, "read", None)  # a 503 has its reason in the body
        body = read(_LONGEST_STATUS) if read else b"{}"
    except OSError:
        return {}
    try:
        status = json.loads(body)
    except ValueError:
        return {}
    return status if isinstance(status, dict) else {}


def main() -> None:
    """Look until SIGTERM or SIGINT."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    Rollout(RolloutSettings(), ClusterSettings()).run(stop)


if __name__ == "__main__":
    main()
