"""Talking to a Kubernetes API server, with patience. Needs the ``airflow`` extra's client."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from sailyard.cluster import (
    JOB,
    KINDS,
    MANAGED_BY,
    RUN_LABEL,
    STAGE_LABEL,
    ClusterSettings,
    Kind,
    Right,
)

T = TypeVar("T")

PATIENCE_SECONDS = 300.0
"""How long an API server may be away or overloaded before that is an error."""

REQUEST_SECONDS = 30.0
LONGEST_PAUSE = 15.0


def kubeconfig(cluster: ClusterSettings) -> dict[str, Any] | None:
    """Arguments for loading a kubeconfig; None: the pod's own service account is to be used."""
    path = os.environ.get("KUBECONFIG")
    if not (cluster.context or path or Path("~/.kube/config").expanduser().exists()):
        return None
    return {"config_file": path, "context": cluster.context or None}


def connect(cluster: ClusterSettings) -> client.ApiClient:
    """A client of the cluster that the settings name.

    Raises:
        ValueError: There is neither a kubeconfig nor a service account.
    """
    configuration = client.Configuration()
    arguments = kubeconfig(cluster)
    try:
        if arguments is None:
            config.load_incluster_config(client_configuration=configuration)
        else:
            config.load_kube_config(client_configuration=configuration, **arguments)
    except config.ConfigException as error:
        raise no_cluster(error) from error
    # One place decides about retries, and it knows what a 429 asks for.
    configuration.retries = False
    return client.ApiClient(configuration)


def no_cluster(error: Exception) -> ValueError:
    """What to tell somebody whose settings lead to no cluster."""
    return ValueError(
        f"no cluster to talk to ({error}); set KUBECONFIG, or SAILYARD_CLUSTER_CONTEXT too"
    )


def patiently(call: Callable[[], T], patience_s: float = PATIENCE_SECONDS) -> T:
    """Call again while the API server is away, overloaded or breaks off in the middle."""
    deadline = time.monotonic() + patience_s
    pause = 0.5
    while True:
        try:
            return call()
        except ApiException as error:
            if not is_passing(error.status):
                raise
            problem: Exception = error
        except (HTTPError, OSError) as error:
            problem = error
        wait = max(pause, retry_after(problem))
        if time.monotonic() + wait > deadline:
            raise problem
        time.sleep(wait)
        pause = min(2 * pause, LONGEST_PAUSE)


def is_passing(status: int | None) -> bool:
    """Whether an HTTP status speaks of the server's state, not of the request."""
    return status in (None, 0, 408, 429) or 500 <= status < 600


def retry_after(problem: Exception) -> float:
    """Seconds that a 429 or 503 asks to wait, within reason."""
    headers = getattr(problem, "headers", None) or {}
    text = str(headers.get("Retry-After", ""))
    return min(float(text), LONGEST_PAUSE) if text.isdigit() else 0.0


class StageJobInfo(NamedTuple):
    """An object that a launcher made of a stage.

    Attributes:
        kind: Of the object.
        name: Of the object.
        uid: Its identity; the name may come again.
        run: Id of the pipeline run.
        stage: Of that run.
        state: suspended | running | complete | failed | going.
        age_s: By the API server's clock of its creation and ours.
    """

    kind: Kind
    name: str
    uid: str
    run: str
    stage: str
    state: str
    age_s: float

    @property
    def ended(self) -> bool:
        """Nothing waits for it any more but its time to live."""
        return self.state in ("complete", "failed")


def stage_jobs(api: client.ApiClient, cluster: ClusterSettings) -> list[StageJobInfo]:
    """All objects of the namespace that a launcher made of stages, the oldest first."""
    selector = ",".join(f"{key}={value}" for key, value in MANAGED_BY.items()) + f",{STAGE_LABEL}"
    objects = client.CustomObjectsApi(api)

    def of(kind: Kind) -> list[Any]:
        try:
            return patiently(
                lambda: objects.list_namespaced_custom_object(
                    *address(kind, cluster.namespace),
                    label_selector=selector,
                    _request_timeout=REQUEST_SECONDS,
                )["items"],
                patience_s=10.0,
            )
        except ApiException as error:
            if error.status == 404 and kind != JOB:
                return []  # asked for, and not installed: launching says so
            raise

    found = [_info(kind, item) for kind in cluster.kinds for item in of(kind)]
    return sorted(found, key=lambda job: -job.age_s)


def address(kind: Kind, namespace: str) -> tuple[str, str, str, str]:
    """Where the API has objects of that kind. Jobs are had the same way as what was added later."""
    return kind.group, kind.version, namespace, kind.plural


def join_handle(kind: Kind, name: str, uid: str) -> str:
    """A launcher's name for an object: "name/uid", and the kind behind it unless it is a Job."""
    return f"{name}/{uid}" if kind == JOB else f"{name}/{uid}/{kind.plural}"


def split_handle(handle: str) -> tuple[Kind, str, str]:
    """Kind, name and uid of the object."""
    name, uid, *plural = handle.split("/")
    return KINDS[plural[0]] if plural else JOB, name, uid


def delete_object(
    objects: client.CustomObjectsApi, namespace: str, kind: Kind, name: str, uid: str
) -> None:
    """Delete that very object with its pods, never a newer one of its name; gone is no error."""
    options = client.V1DeleteOptions(
        propagation_policy="Foreground", preconditions=client.V1Preconditions(uid=uid)
    )
    try:
        objects.delete_namespaced_custom_object(
            *address(kind, namespace), name, body=options, _request_timeout=REQUEST_SECONDS
        )
    except ApiException as error:
        if error.status not in (404, 409):
            raise


def missing_rights(api: client.ApiClient, cluster: ClusterSettings) -> Iterator[Right]:
    """What the settings take and the client lacks. Anybody may ask this about himself."""
    reviews = client.AuthorizationV1Api(api)
    for right in cluster.rights:
        resource, _, part = right.resource.partition("/")
        attributes = {
            "namespace": cluster.namespace,
            "group": right.group,
            "resource": resource,
            "subresource": part,
            "verb": right.verb,
        }
        body = {"spec": {"resourceAttributes": attributes}}
        review = patiently(
            lambda body=body: reviews.create_self_subject_access_review(  # type: ignore[misc]
                body, _request_timeout=REQUEST_SECONDS
            ),
            patience_s=10.0,
        )
        if not review.status.allowed:
            yield right


def _info(kind: Kind, found: dict[str, Any]) -> StageJobInfo:
    meta, status = found["metadata"], found.get("status", {})
    notes = meta.get("annotations", {})
    ended = {c["type"].lower() for c in status.get("conditions", []) if c["status"] == "True"}
    # What a Job calls complete, a JobSet calls completed; a RayJob has a word instead.
    ended |= {status.get("jobDeploymentStatus", "").lower()}
    state = "suspended" if found["spec"].get("suspend") else "running"
    if ended & {"complete", "completed"}:
        state = "complete"
    if ended & {"failed", "validationfailed"}:
        state = "failed"
    if "deletionTimestamp" in meta:
        state = "going"
    made = datetime.fromisoformat(meta["creationTimestamp"])
    age = (datetime.now(UTC) - made).total_seconds()
    run, stage = notes.get(RUN_LABEL, "?"), notes.get(STAGE_LABEL, "?")
    return StageJobInfo(kind, meta["name"], meta["uid"], run, stage, state, max(0.0, age))
