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

from sailyard.cluster import MANAGED_BY, RIGHTS, RUN_LABEL, STAGE_LABEL, ClusterSettings, Right

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
    """A Job that a launcher made.

    Attributes:
        name: Of the Job.
        uid: Its identity; the name may come again.
        run: Id of the pipeline run.
        stage: Of that run.
        state: suspended | running | complete | failed | going.
        age_s: By the API server's clock of its creation and ours.
    """

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
    """All Jobs of the namespace that a launcher made, the oldest first."""
    selector = ",".join(f"{key}={value}" for key, value in MANAGED_BY.items()) + f",{STAGE_LABEL}"
    batch = client.BatchV1Api(api)
    listed = patiently(
        lambda: batch.list_namespaced_job(
            cluster.namespace, label_selector=selector, _request_timeout=REQUEST_SECONDS
        ),
        patience_s=10.0,
    )
    return sorted((_info(job) for job in listed.items), key=lambda job: -job.age_s)


def delete_job(batch: client.BatchV1Api, namespace: str, name: str, uid: str) -> None:
    """Delete that very Job with its pods, never a newer one of its name; gone is no error."""
    options = client.V1DeleteOptions(
        propagation_policy="Foreground", preconditions=client.V1Preconditions(uid=uid)
    )
    try:
        batch.delete_namespaced_job(name, namespace, body=options, _request_timeout=REQUEST_SECONDS)
    except ApiException as error:
        if error.status not in (404, 409):
            raise


def missing_rights(api: client.ApiClient, cluster: ClusterSettings) -> Iterator[Right]:
    """Those of ``RIGHTS`` that the client lacks. Anybody may ask this about himself."""
    reviews = client.AuthorizationV1Api(api)
    for right in RIGHTS:
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


def _info(job: Any) -> StageJobInfo:
    meta = job.metadata
    notes = meta.annotations or {}
    ended = {c.type.lower() for c in job.status.conditions or [] if c.status == "True"}
    state = "suspended" if job.spec.suspend else "running"
    for name in ("complete", "failed"):
        state = name if name in ended else state
    if meta.deletion_timestamp is not None:
        state = "going"
    age = (datetime.now(UTC) - meta.creation_timestamp).total_seconds()
    run, stage = notes.get(RUN_LABEL, "?"), notes.get(STAGE_LABEL, "?")
    return StageJobInfo(meta.name, meta.uid, run, stage, state, max(0.0, age))
