"""Following a stage's Job: its end, what it waits for, and the log of rank 0, all at once.

One watch on the Job says at once when it has ended. Everything else may break, and is tried again:
nothing is known here that the cluster does not know, so a follower may be started afresh anywhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

import aiohttp
from kubernetes_asyncio import client, config, watch
from kubernetes_asyncio.client.exceptions import ApiException

from operators.launchers.base import JobState
from operators.launchers.job_status import (
    PODS_OF,
    WORKLOAD_OF,
    Cursor,
    by_age,
    explain,
    has_ended,
    job_state,
    rank_zero,
)
from sailyard.cluster import WORKLOAD, ClusterSettings
from sailyard.cluster_api import (
    LONGEST_PAUSE,
    REQUEST_SECONDS,
    address,
    is_passing,
    kubeconfig,
    no_cluster,
    retry_after,
    split_handle,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

POLL_SECONDS = 2.0
"""Between looks at the pods, while they do not run, or at what Kueue says."""

WATCH_SECONDS = 240
"""The API server ends a watch after this long; then the Job is read afresh."""

DRAIN_SECONDS = 3.0
"""How long the last lines may take once the Job has ended."""

BROKEN = (aiohttp.ClientError, TimeoutError, OSError)


async def connect_async(cluster: ClusterSettings) -> client.ApiClient:
    """As ``sailyard.cluster_api.connect``, for asyncio."""
    configuration = client.Configuration()
    arguments = kubeconfig(cluster)
    try:
        if arguments is None:
            config.load_incluster_config(  # type: ignore[no-untyped-call]
                client_configuration=configuration
            )
        else:
            await config.load_kube_config(client_configuration=configuration, **arguments)
    except config.ConfigException as error:
        raise no_cluster(error) from error
    return client.ApiClient(configuration)


class JobFollower:
    """Follows one Job to its end.

    Attributes:
        state: Where the Job is, as last seen.
        reason: How it failed or why it is gone, once it has ended.
        log_read: Whether every line that rank 0 wrote has been read; else look into the store.
    """

    def __init__(self, api: client.ApiClient, cluster: ClusterSettings, handle: str) -> None:
        self._kind, self._name, self._uid = split_handle(handle)
        self._cluster = cluster
        self._address = address(self._kind, cluster.namespace)
        self._objects, self._core = client.CustomObjectsApi(api), client.CoreV1Api(api)
        self._found: Any = None
        self._ended = asyncio.Event()
        self._lines: asyncio.Queue[str] = asyncio.Queue()
        self._read_to_end: dict[str, bool] = {}
        self._refused = False
        self.state = JobState.WAITING
        self.reason = ""

    @property
    def log_read(self) -> bool:
        return bool(self._read_to_end) and all(self._read_to_end.values())

    async def lines(self) -> AsyncGenerator[str, None]:
        """Lines of rank 0, and a line for each new thing that is waited for; ends with the Job.

        Raises:
            ApiException: The API server refuses (a right is missing), which waiting cannot mend.
        """
        work = asyncio.create_task(self._follow())
        try:
            while True:
                line = asyncio.create_task(self._lines.get())
                await asyncio.wait({line, work}, return_when=asyncio.FIRST_COMPLETED)
                if not line.done():
                    line.cancel()
                    break
                yield line.result()
            while not self._lines.empty():
                yield self._lines.get_nowait()
            await work
        finally:
            work.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await work

    async def _follow(self) -> None:
        self._take(await self._patiently(self._read_job))
        try:
            async with asyncio.TaskGroup() as helpers:
                reading = helpers.create_task(self._follow_log())
                waiting = helpers.create_task(self._tell_what_is_waited_for())
                await self._watch_job()
                self._ended.set()
                waiting.cancel()
                await asyncio.wait({reading}, timeout=DRAIN_SECONDS)
                reading.cancel()
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        if self.state is not JobState.SUCCEEDED:
            pods = [] if self._found is None else await self._pods()
            self.reason = explain(self._kind, self.state, self._found, pods, self._cluster.queue)

    async def _watch_job(self) -> None:
        """Until the Job has ended. A stream that ends, breaks or is too old (410) starts again."""
        while not has_ended(self.state):
            try:
                async with watch.Watch() as events:
                    async for event in events.stream(
                        self._objects.list_namespaced_custom_object,
                        *self._address,
                        field_selector=f"metadata.name={self._name}",
                        resource_version=self._found["metadata"]["resourceVersion"],
                        timeout_seconds=WATCH_SECONDS,
                        _request_timeout=(REQUEST_SECONDS, WATCH_SECONDS + REQUEST_SECONDS),
                    ):
                        gone = event["type"] == "DELETED"
                        self._take(None if gone else event["object"])
                        if has_ended(self.state):
                            return
            except ApiException as error:
                if error.status != 410 and not is_passing(error.status):
                    raise
                log.debug("watch of %s: %s", self._name, error)
            except BROKEN as error:
                log.debug("watch of %s: %s", self._name, error)
            await asyncio.sleep(POLL_SECONDS / 4)
            self._take(await self._patiently(self._read_job))

    def _take(self, found: Any) -> None:
        self._found = found
        self.state = job_state(self._kind, found, self._uid)

    @property
    def _suspended(self) -> bool:
        return bool(self._found["spec"].get("suspend"))

    async def _read_job(self) -> Any:
        try:
            return await self._objects.get_namespaced_custom_object(
                *self._address, self._name, _request_timeout=REQUEST_SECONDS
            )
        except ApiException as error:
            if error.status == 404:
                return None
            raise

    async def _pods(self) -> list[Any]:
        """Pods of the Job, the oldest first."""
        listed = await self._patiently(
            lambda: self._core.list_namespaced_pod(
                self._cluster.namespace,
                label_selector=f"{PODS_OF[self._kind]}={self._name}",
                _request_timeout=REQUEST_SECONDS,
            )
        )
        return by_age(listed.items)

    async def _workloads(self) -> list[Any]:
        """What Kueue made of the Job. Nothing where that cannot be had: it waits all the same."""
        try:
            listed: Any = await self._objects.list_namespaced_custom_object(
                *address(WORKLOAD, self._cluster.namespace),
                label_selector=f"{WORKLOAD_OF}={self._uid}",
                _request_timeout=REQUEST_SECONDS,
            )
        except (ApiException, *BROKEN) as error:
            log.debug("Kueue's workload of %s: %s", self._name, error)
            return []
        return list(listed["items"])

    async def _tell_what_is_waited_for(self) -> None:
        told, queue = "", self._cluster.queue
        while True:
            reason = ""
            if self.state is JobState.WAITING:
                pods = [] if self._suspended else await self._pods()
                workloads = await self._workloads() if self._suspended and queue else []
                reason = explain(self._kind, self.state, self._found, pods, queue, workloads)
            if reason and reason != told:
                self._lines.put_nowait(f"waiting: {reason}")
            told = reason
            await asyncio.sleep(POLL_SECONDS)

    async def _follow_log(self) -> None:
        cursor = Cursor()
        while True:
            # Once more after the end: the last lines may not have been read.
            last = self._ended.is_set()
            if self._found is not None and not self._suspended:
                pod = rank_zero(await self._pods())
                if pod is not None and pod.status.phase not in ("Pending", None):
                    await self._read_log(pod.metadata, cursor)
            if last:
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), POLL_SECONDS)

    async def _read_log(self, pod: Any, cursor: Cursor) -> None:
        """What the pod says that the cursor has not seen, until its stream ends."""
        cursor.turn_to(pod.uid)
        self._read_to_end[pod.uid] = False
        try:
            response: Any = await self._core.read_namespaced_pod_log(
                pod.name,
                self._cluster.namespace,
                follow=True,
                timestamps=True,
                _preload_content=False,
                # A stream that says nothing is asked for again: its connection may be dead.
                _request_timeout=(REQUEST_SECONDS, 2 * REQUEST_SECONDS),
                **cursor.since(),
            )
            if response.status >= 400:
                raise ApiException(status=response.status, reason=await response.text())
            rest = b""
            async for chunk in response.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._take_line(line, cursor)
            if rest:  # half a line at the end is a line too
                self._take_line(rest, cursor)
            self._read_to_end[pod.uid] = True
        except (ApiException, *BROKEN) as error:
            if getattr(error, "status", None) == 403 and not self._refused:
                self._refused = True
                self._lines.put_nowait(f"the log of {pod.name} may not be read: {error}")
            log.debug("log of %s: %s", pod.name, error)

    def _take_line(self, line: bytes, cursor: Cursor) -> None:
        text = cursor.take(line.decode(errors="replace").rstrip("\r"))
        if text is not None:
            self._lines.put_nowait(text)

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Call again for as long as it takes: the Job has its own deadline."""
        pause = POLL_SECONDS / 4
        while True:
            try:
                return await call()
            except ApiException as error:
                if not is_passing(error.status):
                    raise
                problem: Exception = error
            except BROKEN as error:
                problem = error
            log.debug("%s: the API server is away: %s", self._name, problem)
            await asyncio.sleep(max(pause, retry_after(problem)))
            pause = min(2 * pause, LONGEST_PAUSE)
