"""Stages as Indexed Jobs on a Kubernetes cluster.

Names are a function of run and stage, so a launcher that starts afresh finds the Job that another
one made. A handle is "name/uid": a Job of the same name that was made later is another Job.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException

from operators.launchers.base import JobState, StageJob
from operators.launchers.job_status import by_age, explain, has_ended, job_state
from operators.launchers.kubernetes_follow import JobFollower, connect_async
from operators.launchers.manifests import (
    JOB_NAME,
    RUN_ANNOTATION,
    STAGE_ANNOTATION,
    check_reachable,
    job_manifest,
    object_name,
    service_manifest,
    stage_size,
)
from sailyard.cluster import MANAGED_BY, ClusterSettings
from sailyard.cluster_api import PATIENCE_SECONDS, REQUEST_SECONDS, connect, delete_job, patiently
from sailyard.runs import load_run
from sailyard.yard import Yard

log = logging.getLogger(__name__)

_SOON = 0.5


class ForeignObject(ValueError):
    """An object of the stage's name exists that no launcher made."""


class KubernetesLauncher:
    """Runs each stage as a Job."""

    detached = True

    def __init__(self, cluster: ClusterSettings | None = None, yard: Yard | None = None) -> None:
        """Args: both by default those of the environment."""
        self.cluster = cluster or ClusterSettings()
        self.yard = yard or Yard()
        api = connect(self.cluster)
        self._batch, self._core = client.BatchV1Api(api), client.CoreV1Api(api)

    def submit(self, job: StageJob) -> str:
        """Create the stage's Job, or find the one that an earlier call made.

        A Job that still runs is joined. One that has ended is deleted first, since this is the
        next try; the stage then resumes from its own checkpoint.

        Raises:
            ValueError: Settings do not fit, or the name is taken by somebody else's object.
        """
        check_reachable(self.yard.settings)
        stage = load_run(job.run_id, self.yard).pipeline.stage(job.stage)
        size = stage_size(stage, self.cluster)
        manifest = job_manifest(job, size, self.cluster, self.yard.settings)
        made = self._find_or_create(object_name(job), job, manifest)
        if size.nodes > 1:
            self._find_or_create_service(job, made.metadata.uid)
        return f"{made.metadata.name}/{made.metadata.uid}"

    def status(self, handle: str) -> JobState:
        """Where the Job is, by its conditions; one that is gone was interrupted."""
        name, uid = handle.split("/")
        return job_state(self._read(self._batch.read_namespaced_job, name), uid)

    def reason(self, handle: str) -> str:
        """In words: how the Job failed, or what it waits for; "" while all is well."""
        name, uid = handle.split("/")
        found = self._read(self._batch.read_namespaced_job, name)
        listed = patiently(
            lambda: self._core.list_namespaced_pod(
                self.cluster.namespace, label_selector=f"{JOB_NAME}={name}", **_timeout()
            )
        )
        return explain(job_state(found, uid), found, by_age(listed.items), self.cluster.queue)

    def logs(self, handle: str) -> Iterator[str]:
        """Lines of rank 0 as they come, of its pod and of those that replace it.

        The complete log lies in the store: a pod takes its own along when it goes.
        """
        with asyncio.Runner() as runner:
            api = runner.run(connect_async(self.cluster))
            lines = JobFollower(api, self.cluster, handle).lines()
            try:
                while (line := runner.run(_next(lines))) is not None:
                    yield line
            finally:
                runner.run(lines.aclose())
                runner.run(api.close())

    def cancel(self, handle: str, grace_s: float) -> None:
        """Delete what ``submit`` made. The cluster ends the pods, within the grace of the
        settings, whether or not this process lives on; ``grace_s`` bounds this call only.
        """
        name, uid = handle.split("/")
        patiently(lambda: delete_job(self._batch, self.cluster.namespace, name, uid), grace_s)

    def _find_or_create(self, name: str, job: StageJob, manifest: dict[str, Any]) -> Any:
        deadline = time.monotonic() + PATIENCE_SECONDS + self.cluster.grace_seconds
        while time.monotonic() < deadline:
            found = self._read(self._batch.read_namespaced_job, name)
            if found is None:
                made = self._create(self._batch.create_namespaced_job, manifest)
                if made is not None:
                    return made
                continue  # somebody was faster: look again
            _check_ours(found, {RUN_ANNOTATION: job.run_id, STAGE_ANNOTATION: job.stage}, "Job")
            if found.metadata.deletion_timestamp is None:
                if not has_ended(job_state(found, found.metadata.uid)):
                    log.info("%s: joined the Job %s", job.stage, name)
                    return found
                self.cancel(f"{name}/{found.metadata.uid}", REQUEST_SECONDS)
            time.sleep(_SOON)
        raise TimeoutError(
            f"Job {name} of an earlier try does not go away; look at it with: "
            f"kubectl -n {self.cluster.namespace} describe job {name}"
        )

    def _find_or_create_service(self, job: StageJob, job_uid: str) -> None:
        """A Service goes with the Job it belongs to: one of an earlier try is about to vanish."""
        manifest = service_manifest(job, self.cluster, job_uid)
        name = manifest["metadata"]["name"]
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            if self._create(self._core.create_namespaced_service, manifest) is not None:
                return
            found = self._read(self._core.read_namespaced_service, name)
            if found is None:
                continue
            _check_ours(found, manifest["metadata"]["annotations"], "Service")
            if job_uid in {owner.uid for owner in found.metadata.owner_references or []}:
                return
            self._delete_service(name, found.metadata.uid)
            time.sleep(_SOON)
        raise TimeoutError(f"Service {name} of an earlier try does not go away")

    def _delete_service(self, name: str, uid: str) -> None:
        options = client.V1DeleteOptions(preconditions=client.V1Preconditions(uid=uid))
        try:
            patiently(
                lambda: self._core.delete_namespaced_service(
                    name, self.cluster.namespace, body=options, **_timeout()
                )
            )
        except ApiException as error:
            if error.status not in (404, 409):
                raise

    def _create(self, create: Callable[..., Any], manifest: dict[str, Any]) -> Any:
        """What was created; None when there is one of that name."""
        try:
            return patiently(lambda: create(self.cluster.namespace, manifest, **_timeout()))
        except ApiException as error:
            if error.status == 409:
                return None
            raise

    def _read(self, read: Callable[..., Any], name: str) -> Any:
        """What there is of that name, or None."""
        try:
            return patiently(lambda: read(name, self.cluster.namespace, **_timeout()))
        except ApiException as error:
            if error.status == 404:
                return None
            raise


def _check_ours(found: Any, annotations: dict[str, str], kind: str) -> None:
    meta = found.metadata
    ours = MANAGED_BY.items() <= (meta.labels or {}).items()
    if not ours or not annotations.items() <= (meta.annotations or {}).items():
        raise ForeignObject(
            f"{kind} {meta.name} in namespace {meta.namespace} is not of this stage; rename or "
            "delete it"
        )


async def _next(lines: Any) -> str | None:
    return await anext(lines, None)


def _timeout() -> dict[str, float]:
    return {"_request_timeout": REQUEST_SECONDS}
