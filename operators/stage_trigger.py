"""The trigger that waits for a stage's Job without holding a worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from airflow.triggers.base import BaseTrigger, TaskSuccessEvent, TriggerEvent

from sailyard.cluster import ClusterSettings
from sailyard.runs import stage_result
from sailyard.stage.results import StageResult

# Airflow gives on_kill half a minute.
KILL_SECONDS = 20.0


def summary(result: StageResult) -> dict[str, Any]:
    """What the task of a finished stage returns."""
    return {
        "cached": result.cached,
        "cache_key": result.cache_key,
        "outputs": dict(result.outputs),
        "seconds": result.seconds,
    }


class StageTrigger(BaseTrigger):
    """Follows a Job to its end; its log lines go into the task's log meanwhile.

    Args:
        handle: Of the Kubernetes launcher. All else comes from the cluster and the environment,
            so any triggerer may take over at any time.
        run: Id of the pipeline run.
        stage: Name of the stage.

    Its only event ends the task at once when the stage has finished and its log is complete: a
    worker that starts for that alone keeps the next stage waiting. Otherwise the task resumes with
    a dict: "state" (a ``JobState``), "reason" (text), "log_read" (whether all of rank 0's lines are
    in the task's log).
    """

    def __init__(self, handle: str, run: str, stage: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.handle, self.run_id, self.stage = handle, run, stage

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """How to make this trigger again."""
        arguments = {"handle": self.handle, "run": self.run_id, "stage": self.stage}
        return f"{__name__}.{type(self).__name__}", arguments

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
        result = await asyncio.to_thread(self._finished) if follower.log_read else None
        if result is not None:
            yield TaskSuccessEvent(xcoms={"return_value": summary(result)})
            return
        yield TriggerEvent(  # type: ignore[no-untyped-call]
            {
                "state": str(follower.state),
                "reason": follower.reason,
                "log_read": follower.log_read,
            }
        )

    def _finished(self) -> StageResult | None:
        """The stage's result if it has finished; None as well when the store does not say."""
        try:
            result = stage_result(self.run_id, self.stage)
        except Exception as error:  # the task itself will ask again, and may be tried again
            self.log.warning("the result of %s could not be read: %s", self.stage, error)
            return None
        return result if result is not None and result.finished else None

    async def on_kill(self) -> None:
        """Delete the Job: somebody cleared the task, or marked it failed or done.

        Airflow does not call this when the triggerer restarts or hands over.
        """
        from operators.launchers.kubernetes import KubernetesLauncher

        await asyncio.to_thread(lambda: KubernetesLauncher().cancel(self.handle, KILL_SECONDS))
