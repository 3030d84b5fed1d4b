"""The trigger that waits for a stage's Job without holding a worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from sailyard.cluster import ClusterSettings

# Airflow gives on_kill half a minute.
KILL_SECONDS = 20.0


class StageTrigger(BaseTrigger):
    """Follows a Job to its end; its log lines go into the task's log meanwhile.

    Args:
        handle: Of the Kubernetes launcher. All else comes from the cluster and the environment,
            so any triggerer may take over at any time.

    Its only event is a dict: "state" (a ``JobState``), "reason" (text), "log_read" (whether all of
    rank 0's lines are in the task's log).
    """

    def __init__(self, handle: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.handle = handle

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """How to make this trigger again."""
        return f"{__name__}.{type(self).__name__}", {"handle": self.handle}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Follow the Job."""
        # Its client takes half a second to import, and operators are parsed all the time.
        from operators.launchers.kubernetes_follow import JobFollower, connect_async

        cluster = ClusterSettings()
        api = await connect_async(cluster)
        try:
            follower = JobFollower(api, cluster, self.handle)
            async for line in follower.lines():
                self.log.info("%s", line)
        finally:
            await api.close()
        yield TriggerEvent(  # type: ignore[no-untyped-call]
            {
                "state": str(follower.state),
                "reason": follower.reason,
                "log_read": follower.log_read,
            }
        )

    async def on_kill(self) -> None:
        """Delete the Job: somebody cleared the task, or marked it failed or done.

        Airflow does not call this when the triggerer restarts or hands over.
        """
        from operators.launchers.kubernetes import KubernetesLauncher

        await asyncio.to_thread(lambda: KubernetesLauncher().cancel(self.handle, KILL_SECONDS))
