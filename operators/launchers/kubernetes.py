"""Stages as Indexed Jobs on a Kubernetes cluster, or as JobSets and RayJobs where it has them.

Names are a function of run and stage, so a launcher that starts afresh finds the object that
another one made. A handle holds the uid, too: an object of the same name that was made later is
another one.
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
from operators.launchers.job_status import has_ended, job_state
from operators.launchers.jobset_manifest import jobset_manifest
from operators.launchers.kubernetes_follow import JobFollower, connect_async
from operators.launchers.manifests import (
    RUN_ANNOTATION,
    STAGE_ANNOTATION,
    Size,
    check_reachable,
    job_manifest,
    service_manifest,
    stage_size,
)
from operators.launchers.rayjob_manifest import rayjob_manifest
from sailyard.cluster import JOB, JOBSET, MANAGED_BY, RAYJOB, ClusterSettings, Kind
from sailyard.cluster_api import (
    PATIENCE_SECONDS,
    REQUEST_SECONDS,
    address,
    connect,
    delete_object,
    join_handle,
    patiently,
    split_handle,
)
from sailyard.pipeline import Stage
from sailyard.runs import load_run
from sailyard.yard import Yard

log = logging.getLogger(__name__)

_SOON = 0.5


class ForeignObject(ValueError):
    """An object of the stage's name exists that no launcher made."""


class MissingApi(ValueError):
    """The settings ask for a kind of object that the cluster does not know."""


class KubernetesLauncher:
    """Runs each stage as a Job, a JobSet or a RayJob."""

    detached = True

    def __init__(self, cluster: ClusterSettings | None = None, yard: Yard | None = None) -> None:
        """Args: both by default those of the environment."""
        self.cluster = cluster or ClusterSettings()
        self.yard = yard or Yard()
        api = connect(self.cluster)
        self._objects, self._core = client.CustomObjectsApi(api), client.CoreV1Api(api)

    def submit(self, job: StageJob) -> str:
        """Create the stage's object, or find the one that an earlier call made.

        One that still runs is joined. One that has ended is deleted first, since this is the
        next try; the stage then resumes from its own checkpoint.

        Raises:
            ValueError: Settings do not fit, or the name is taken by somebody else's object.
            MissingApi: The settings ask for what the cluster does not have.
        """
        check_reachable(self.yard.settings)
        stage = load_run(job.run_id, self.yard).pipeline.stage(job.stage)
        size = stage_size(stage, self.cluster)
        kind = kind_of(stage, size, self.cluster)
        make = {JOB: job_manifest, JOBSET: jobset_manifest, RAYJOB: rayjob_manifest}[kind]
        manifest = make(job, size, self.cluster, self.yard.settings)
        made = self._find_or_create(kind, job, manifest)["metadata"]
        if kind == JOB and size.nodes > 1:
            self._find_or_create_service(job, made["uid"])
        return join_handle(kind, made["name"], made["uid"])

    def status(self, handle: str) -> JobState:
        """Where the stage is, by its object's status; one that is gone was interrupted."""
        kind, name, uid = split_handle(handle)
        return job_state(kind, self._read(kind, name), uid)

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
        which = split_handle(handle)
        patiently(lambda: delete_object(self._objects, self.cluster.namespace, *which), grace_s)

    def _find_or_create(self, kind: Kind, job: StageJob, manifest: dict[str, Any]) -> Any:
        name = manifest["metadata"]["name"]
        deadline = time.monotonic() + PATIENCE_SECONDS + self.cluster.grace_seconds
        while time.monotonic() < deadline:
            found = self._read(kind, name)
            if found is None:
                made = self._create_object(kind, manifest)
                if made is not None:
                    return made
                continue  # somebody was faster: look again
            meta = found["metadata"]
            notes = {RUN_ANNOTATION: job.run_id, STAGE_ANNOTATION: job.stage}
            _check_ours(meta, notes, kind.name)
            if "deletionTimestamp" not in meta:
                if not has_ended(job_state(kind, found, meta["uid"])):
                    log.info("%s: joined the %s %s", job.stage, kind.name, name)
                    return found
                self.cancel(join_handle(kind, name, meta["uid"]), REQUEST_SECONDS)
            time.sleep(_SOON)
        raise TimeoutError(
            f"{kind.name} {name} of an earlier try does not go away; look at it with: "
            f"kubectl -n {self.cluster.namespace} describe {kind.plural} {name}"
        )

    def _create_object(self, kind: Kind, manifest: dict[str, Any]) -> Any:
        try:
            return self._create(
                lambda: self._objects.create_namespaced_custom_object(
                    *address(kind, self.cluster.namespace), manifest, **_timeout()
                )
            )
        except ApiException as error:
            if error.status != 404 or self._has_api(kind):
                raise
            raise MissingApi(
                f"{kind.variable} asks for a {kind.name}, and the cluster has no "
                f"{kind.plural}.{kind.group} of version {kind.version}: have it installed, or "
                "unset the variable"
            ) from error

    def _has_api(self, kind: Kind) -> bool:
        """Anybody may ask this. A 404 of a namespace that is not there looks the same."""
        try:
            found = patiently(
                lambda: self._objects.get_api_resources(kind.group, kind.version, **_timeout())
            )
        except ApiException as error:
            if error.status == 404:
                return False
            raise
        return kind.plural in {resource.name for resource in found.resources}

    def _find_or_create_service(self, job: StageJob, job_uid: str) -> None:
        """A Service goes with the Job it belongs to: one of an earlier try is about to vanish."""
        manifest = service_manifest(job, self.cluster, job_uid)
        name = manifest["metadata"]["name"]
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            made = self._create(
                lambda: self._core.create_namespaced_service(
                    self.cluster.namespace, manifest, **_timeout()
                )
            )
            if made is not None:
                return
            found = self._find(
                lambda: self._core.read_namespaced_service(
                    name, self.cluster.namespace, **_timeout()
                )
            )
            if found is None:
                continue
            meta = self._core.api_client.sanitize_for_serialization(found.metadata)
            _check_ours(meta, manifest["metadata"]["annotations"], "Service")
            if job_uid in {owner["uid"] for owner in meta.get("ownerReferences", [])}:
                return
            self._delete_service(name, meta["uid"])
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

    def _create(self, create: Callable[[], Any]) -> Any:
        """What was created; None when there is one of that name."""
        try:
            return patiently(create)
        except ApiException as error:
            if error.status == 409:
                return None
            raise

    def _read(self, kind: Kind, name: str) -> Any:
        """The object of that name, or None."""
        return self._find(
            lambda: self._objects.get_namespaced_custom_object(
                *address(kind, self.cluster.namespace), name, **_timeout()
            )
        )

    def _find(self, read: Callable[[], Any]) -> Any:
        """What was read; None when there is none of that name."""
        try:
            return patiently(read)
        except ApiException as error:
            if error.status == 404:
                return None
            raise


def kind_of(stage: Stage, size: Size, cluster: ClusterSettings) -> Kind:
    """What a stage is on the cluster, as the settings ask for it."""
    if stage.spreads and cluster.ray_workers:
        return RAYJOB
    return JOBSET if cluster.jobset and size.nodes > 1 else JOB


def _check_ours(meta: dict[str, Any], annotations: dict[str, str], kind: str) -> None:
    ours = MANAGED_BY.items() <= meta.get("labels", {}).items()
    if not ours or not annotations.items() <= meta.get("annotations", {}).items():
        raise ForeignObject(
            f"{kind} {meta['name']} in namespace {meta['namespace']} is not of this stage; rename "
            "or delete it"
        )


async def _next(lines: Any) -> str | None:
    return await anext(lines, None)


def _timeout() -> dict[str, float]:
    return {"_request_timeout": REQUEST_SECONDS}
