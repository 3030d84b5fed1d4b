"""Runs one stage of a run in this process: look up, lock, run, publish, record."""

from __future__ import annotations

import fcntl
import importlib
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from sailyard.lineage import ArtifactInfo, records
from sailyard.pipeline import Stage
from sailyard.runs import Run, results_of, reuse, was_attempted
from sailyard.stage.checkpoints import Checkpoints
from sailyard.stage.context import StageContext
from sailyard.stage.errors import EXIT_FAILED, EXIT_OK, EXIT_RESUME, StageError, StopRequested
from sailyard.stage.exposition import Exposition
from sailyard.stage.live import LiveRecorder
from sailyard.stage.results import StageResult, global_key, write_result, write_run_copy

if TYPE_CHECKING:
    from sailyard.yard import Yard

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Both ask to stop: a scheduler sends the first, Ctrl-C the second."""


def execute(
    yard: Yard, run: Run, stage: Stage, *, force: bool = False, channel: int | None = None
) -> int:
    """Run a stage and return the process's exit code.

    0: finished, now or before. 75: stopped on request, run it again. 1: failed; the reason is
    in the log, in the run's result.json and in lineage.

    Args:
        yard: Where to work.
        run: The run.
        stage: A stage of the run's pipeline.
        force: Run even if a finished result exists.
        channel: Pipe to the supervisor's progress bar.
    """
    with stop_signal() as stop:
        try:
            return _execute(yard, run, stage, force, channel, stop)
        except StopRequested:
            print(f"{stage.name}: stopped before it began", flush=True)
            return EXIT_RESUME
        except Exception as error:
            # Nothing of the stage has run: its row, if any, is as it was.
            print(yard.redact(f"{stage.name}: {error}"), flush=True)
            if not isinstance(error, ValueError):
                print(yard.redact(traceback.format_exc()), flush=True)
            return EXIT_FAILED


def _execute(
    yard: Yard, run: Run, stage: Stage, force: bool, channel: int | None, stop: Stop
) -> int:
    results = results_of(yard, run)
    if not force and reuse(yard, run, stage.name, results) is not None:
        print(f"{stage.name}: cached", flush=True)
        return EXIT_OK
    run.check_may_run(stage.name)
    inputs = results.input_digests(stage)
    key = results.key(stage)
    with _only_builder(yard, stage.name, key, stop):
        # Another process may have finished the very same result while this one waited.
        results.forget(stage.name)
        if not force and reuse(yard, run, stage.name, results) is not None:
            print(f"{stage.name}: cached", flush=True)
            return EXIT_OK
        fresh_start = force or (
            stage.name in run.forced() and not was_attempted(yard, run.id, stage.name)
        )
        attempt = _Attempt(yard, run, stage, key, inputs, channel)
        return attempt.carry_out(stop, fresh_start)


class _Attempt:
    """One execution of a stage, from the first row to the last."""

    def __init__(
        self,
        yard: Yard,
        run: Run,
        stage: Stage,
        key: str,
        inputs: Mapping[str, str],
        channel: int | None,
    ) -> None:
        self.yard, self.run, self.stage, self.key, self.inputs = yard, run, stage, key, inputs
        # Only the holder of the key's lock works here, so what is there was left by a kill.
        self.work = yard.folder("work") / f"{run.id}.{stage.name}"
        self.checkpoints = Checkpoints(yard.store, key, self.work / "resume")
        self.channel = channel
        self.started = time.monotonic()

    def carry_out(self, stop: Stop, fresh_start: bool) -> int:
        """Run the entry and record how it ended."""
        shutil.rmtree(self.work, ignore_errors=True)
        if fresh_start:
            self.checkpoints.clear()
        self._note("running")
        stage_run_id = records.start_stage(
            self.yard.database,
            self.run.id,
            self.stage.name,
            self.key,
            self.inputs,
            resumes=self.checkpoints.exist(),
        )
        recorder = LiveRecorder(
            self.yard.database, stage_run_id, self.stage.name, self.channel, self._exposition()
        )
        self.checkpoints = Checkpoints(
            self.yard.store, self.key, self.work / "resume", before_pointer=recorder.flush
        )
        context = self._context(recorder)
        recorder.start()
        print(f"{self.stage.name}: started ({self.key[:12]})", flush=True)
        status, error, outputs = "finished", "", {}
        try:
            with stop.of(context):
                load_entry(self.stage.entry)(context)
            outputs = self._publish(context)
        except StopRequested:
            status = "stopped"
        except BaseException as problem:  # SystemExit and MemoryError are failures, too
            status, error = "failed", _one_line(problem)
            print(self.yard.redact(traceback.format_exc()), flush=True)
        error = self.yard.redact(error)
        return self._conclude(status, error, outputs, context, recorder, stage_run_id)

    def _exposition(self) -> Exposition | None:
        """An endpoint for a scraper, if the settings ask for one; a port that is taken is worth a
        line in the log, not the stage."""
        port = self.yard.settings.metrics_port
        if port is None:
            return None
        try:
            return Exposition(port, self.stage.name, self.run.id)
        except OSError as error:
            print(f"{self.stage.name}: no metrics on port {port}: {error}", flush=True)
            return None

    def _context(self, recorder: LiveRecorder) -> StageContext:
        return StageContext(
            stage=self.stage,
            recipe=self.run.recipe,
            run_id=self.run.id,
            key=self.key,
            input_digests=self.inputs,
            fetch_input=lambda name: self.yard.artifacts.fetch(self.inputs[name]),
            stream_input=lambda name: self.yard.artifacts.stream(self.inputs[name]),
            work=self.work,
            checkpoints=self.checkpoints,
            recorder=recorder,
            open_registry=lambda: self.yard.registry,
            open_artifacts=lambda: self.yard.artifacts,
        )

    def _publish(self, context: StageContext) -> dict[str, ArtifactInfo]:
        folders = {name: context.output(name) for name in self.stage.outputs}
        for name, folder in folders.items():
            if not any(path.is_file() for path in folder.rglob("*")):
                raise StageError(f"stage {self.stage.name!r} left its output {name!r} empty")
        published = {}
        for name, folder in folders.items():
            kind = f"{self.stage.name}/{name}"
            artifact = self.yard.artifacts.publish(folder, kind, context.output_metas.get(name))
            published[name] = ArtifactInfo.of(artifact)
        return published

    def _conclude(
        self,
        status: str,
        error: str,
        outputs: Mapping[str, ArtifactInfo],
        context: StageContext,
        recorder: LiveRecorder,
        stage_run_id: int,
    ) -> int:
        seconds = time.monotonic() - self.started
        problem: Exception | None = None
        try:
            digests = {name: info.digest for name, info in outputs.items()}
            self._note(status, digests, context.summary_values, seconds, error)
        except Exception as lost:
            status, problem = "failed", lost
        try:
            recorder.close()
            records.finish_stage(
                self.yard.database,
                stage_run_id,
                status,
                seconds=seconds,
                summary=context.summary_values,
                error=error or (self.yard.redact(_one_line(problem)) if problem else ""),
                outputs=outputs,
            )
        except Exception as lost:
            problem = problem or lost
        if status == "finished" and problem is None:
            self.checkpoints.clear()
        shutil.rmtree(self.work, ignore_errors=True)
        if problem is not None:
            print(self.yard.redact(f"{self.stage.name}: {_one_line(problem)}"), flush=True)
            print(f"{self.stage.name}: what is done is kept; run it again", flush=True)
            return EXIT_FAILED
        ending = f": {error}" if error else ""
        print(f"{self.stage.name}: {status} after {seconds:.1f} s{ending}", flush=True)
        return {"finished": EXIT_OK, "stopped": EXIT_RESUME}.get(status, EXIT_FAILED)

    def _note(
        self,
        status: str,
        outputs: Mapping[str, str] | None = None,
        metrics: Mapping[str, Any] | None = None,
        seconds: float = 0.0,
        error: str = "",
    ) -> None:
        """Write result.json: under the cache key when finished, then the run's copy."""
        result = StageResult(
            stage=self.stage.name,
            cache_key=self.key,
            status=status,
            run_id=self.run.id,
            inputs=self.inputs,
            outputs=outputs or {},
            metrics=metrics or {},
            seconds=round(seconds, 3),
            error=error,
        )
        if result.finished:
            write_result(self.yard.store, global_key(self.key), result)
        write_run_copy(self.yard.store, self.run.id, result)


class Stop:
    """Carries SIGTERM to whoever can act on it at the moment."""

    def __init__(self) -> None:
        self.requested = threading.Event()
        self._owner = os.getpid()
        self._context: StageContext | None = None

    @contextmanager
    def of(self, context: StageContext) -> Iterator[None]:
        """While the block runs, a stop is the entry's business if it keeps checkpoints."""
        self._context = context
        try:
            if self.requested.is_set():
                raise StopRequested
            yield
        finally:
            self._context = None

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler, in the main thread."""
        if os.getpid() != self._owner:
            # A worker the entry forked has this handler, too, and must end when told to.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        first = not self.requested.is_set()
        self.requested.set()
        context = self._context
        if context is None or not first:
            return
        context.request_stop()
        if not context.stage.resumable:
            raise StopRequested


@contextmanager
def stop_signal() -> Iterator[Stop]:
    """Catch requests to stop while the block runs; outside the main thread there are none."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.handle) for number in STOP_SIGNALS}
    # The supervisor holds them back until this moment.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _only_builder(yard: Yard, stage_name: str, key: str, stop: Stop) -> Iterator[None]:
    """Hold the cache key's lock: two runs of equal stages on a machine build them once.

    A POSIX record lock: it ends with this process however that ends, and the processes it
    starts do not inherit it.
    """
    path = yard.folder("locks") / f"{key}.lock"
    with path.open("a+") as file:
        told = False
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if not told:
                    print(f"{stage_name}: another process is making this result", flush=True)
                    told = True
                if stop.requested.wait(0.2):
                    raise StopRequested from None
        try:
            yield
        finally:
            fcntl.lockf(file, fcntl.LOCK_UN)


def load_entry(entry: str) -> Callable[[StageContext], None]:
    """The function that "package.module:function" names.

    Raises:
        StageError: There is none.
    """
    module_name, _, function_name = entry.partition(":")
    function = getattr(importlib.import_module(module_name), function_name, None)
    if function is None:
        raise StageError(f"module {module_name!r} has no {function_name!r}")
    loaded: Callable[[StageContext], None] = function
    return loaded


def _one_line(problem: BaseException) -> str:
    text = " ".join(str(problem).split())
    name = type(problem).__name__
    # Our own errors are sentences; others say too little without their type.
    return text if text and isinstance(problem, StageError) else f"{name}: {text}".rstrip(": ")
