"""The Airflow operator that runs one stage of a pipeline run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from airflow.sdk import BaseOperator, BaseOperatorLink
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

from operators.launchers import JobState, Launcher, StageJob, make_launcher
from operators.run_task import CREATE_RUN
from operators.stage_trigger import StageTrigger, summary
from sailyard.runs import load_run, reuse_result, stage_log, stage_result
from sailyard.yard import Yard

if TYPE_CHECKING:
    from airflow.sdk import Context
    from airflow.sdk.types import TaskInstanceKey

# Airflow escalates to SIGKILL five seconds after its SIGTERM; be done before.
CANCEL_GRACE_S = 4.0


class StageInterrupted(AirflowException):
    """The stage was stopped from outside; Airflow's next try resumes it."""


def lineage_url(run_id: str, stage: str) -> str:
    """The board's lineage page of one stage; SAILYARD_BOARD_URL says where the board is."""
    board = os.environ.get("SAILYARD_BOARD_URL", "http://127.0.0.1:8501").rstrip("/")
    return f"{board}/lineage?{urlencode({'run': run_id, 'stage': stage})}"


class LineageLink(BaseOperatorLink):
    """A button on the task that opens its lineage on the board."""

    name = "Lineage"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Asked in the task's own process, where the operator's fields are rendered."""
        assert isinstance(operator, StageOperator)
        return lineage_url(operator.run, operator.stage)


class StageOperator(BaseOperator):
    """Runs a stage with a launcher, or reuses its finished result without starting a process.

    Args:
        stage: Name of the stage.
        run: Id of the pipeline run; by default what the task ``create_run`` returned.
        launcher: Name of the launcher; by default the DAG's parameter.

    A stage that the run's recipe does not have is skipped. A stage that was stopped from outside
    (exit status 75, a signal) is tried again and resumes; one that failed by itself is not, since
    it would fail again.

    While a job lives on a cluster the task is deferred: it holds no worker, and a worker, scheduler
    or triggerer that restarts finds the job again.
    """

    template_fields: Sequence[str] = ("stage", "run", "launcher")
    operator_extra_links = (LineageLink(),)
    ui_color = "#d9e8f5"

    def __init__(
        self,
        *,
        stage: str,
        run: str = "{{ ti.xcom_pull(task_ids='" + CREATE_RUN + "') }}",
        launcher: str = "{{ params.launcher }}",
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("retries", 3)
        kwargs.setdefault("retry_delay", timedelta(seconds=5))
        super().__init__(**kwargs)
        self.stage = stage
        self.run = run
        self.launcher = launcher
        self._running: tuple[Launcher, str] | None = None

    def execute(self, context: Context) -> dict[str, Any]:
        """Run or reuse the stage; returns its outputs' digests and how it was had.

        Raises:
            AirflowSkipException: The recipe has no such stage.
            AirflowFailException: The stage failed.
            StageInterrupted: It was stopped; trying again resumes it.
        """
        # Pushed here as well as at the end, so that the link works while the stage runs.
        context["ti"].xcom_push(LineageLink().xcom_key, lineage_url(self.run, self.stage))
        yard = Yard()
        run = load_run(self.run, yard)
        if self.stage not in {stage.name for stage in run.pipeline.stages}:
            raise AirflowSkipException(f"{self.stage} is not part of recipe {run.recipe.name}")
        result = reuse_result(self.run, self.stage, yard)
        if result is not None:
            self.log.info("%s: reused the finished result %s", self.stage, result.cache_key[:12])
            return summary(result)
        launcher = make_launcher(self.launcher)
        if launcher.detached:
            return self._detach(launcher, context)
        self._launch(launcher)
        return self._finished(yard)

    def resume(self, context: Context, event: dict[str, Any] | str) -> dict[str, Any]:
        """Take up the task again when its job has ended; returns and raises as ``execute``.

        Args:
            context: Of the task.
            event: The trigger's. A string only under ``dag.test``, which resumes tasks that the
                trigger has ended.
        """
        yard = Yard()
        if isinstance(event, str):
            return self._finished(yard)
        if not event["log_read"]:
            self.log.info("the log of %s, from the store:", self.stage)
            for line in stage_log(self.run, self.stage, yard=yard).splitlines():
                self.log.info("%s", line)
        return self._conclude(JobState(event["state"]), event["reason"], yard)

    def on_kill(self) -> None:
        """End the stage's processes.

        Runs inside a signal handler, perhaps in the middle of a log call: it must not log.
        """
        if self._running is not None:
            launcher, handle = self._running
            launcher.cancel(handle, CANCEL_GRACE_S)

    def _launch(self, launcher: Launcher) -> None:
        """Run the stage's process to its end, with its lines in this task's log."""
        handle = launcher.submit(StageJob(self.stage, self.run))
        self._running = (launcher, handle)
        try:
            for line in launcher.logs(handle):
                self.log.info("%s", line)
        except BaseException:
            launcher.cancel(handle, CANCEL_GRACE_S)
            raise
        finally:
            self._running = None
        self._raise_unless_succeeded(launcher.status(handle), "the reason is in the lines above")

    def _detach(self, launcher: Launcher, context: Context) -> dict[str, Any]:
        """Submit the job, or find it; wait for it elsewhere unless it has ended meanwhile."""
        handle = launcher.submit(StageJob(self.stage, self.run))
        self._running = (launcher, handle)
        self.log.info("%s: %s", self.stage, handle)
        state = launcher.status(handle)
        if state in (JobState.WAITING, JobState.RUNNING):
            self.defer(trigger=StageTrigger(handle, self.run, self.stage), method_name="resume")
        return self.resume(context, {"state": state, "reason": "", "log_read": False})

    def _conclude(self, state: JobState, reason: str, yard: Yard) -> dict[str, Any]:
        """The outcome by ``result.json``, which is written last; else by how the job ended."""
        result = stage_result(self.run, self.stage, yard)
        if result is not None and result.finished:
            return summary(result)
        if result is not None and result.status == "failed":
            reason = result.error or reason
        self._raise_unless_succeeded(state, reason)
        return self._finished(yard)

    def _raise_unless_succeeded(self, state: JobState, reason: str) -> None:
        if state is JobState.INTERRUPTED:
            raise StageInterrupted(f"{self.stage} was interrupted; the next try resumes it")
        if state is not JobState.SUCCEEDED:
            raise AirflowFailException(f"{self.stage} failed; {reason}")

    def _finished(self, yard: Yard) -> dict[str, Any]:
        result = stage_result(self.run, self.stage, yard)
        if result is None or not result.finished:
            raise AirflowFailException(f"{self.stage} ended well but wrote no finished result")
        return summary(result)
