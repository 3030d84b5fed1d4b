"""``make demo``: the whole pipeline under Airflow on this machine, then the board and the endpoint.

Everything it starts ends with it, however it ends; everything it keeps is in SAILYARD_HOME.
"""

from __future__ import annotations

import argparse
import fcntl
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from rich.console import Console

from operators import demo_view
from operators.airflow_client import AirflowError
from operators.local_airflow import AirflowStartError, LocalAirflow
from operators.processes import (
    ServiceDied,
    Services,
    end_processes,
    free_ports,
    marked_processes,
)
from operators.run_task import CREATE_RUN
from sailyard.cli import output
from sailyard.local import FORK_SERVER
from sailyard.pipeline import build_pipeline
from sailyard.recipe import RecipeError, load_recipe
from sailyard.report import build_report, report_tables
from sailyard.runs import StageState, stage_log, stage_state
from sailyard.settings import get_settings
from sailyard.yard import Yard

DAG_ID = "sail_vl2"
REPOSITORY = Path(__file__).resolve().parents[1]
READY_TIMEOUT_S = 300.0
POLL_S = 1.0
# Asked twice a second, the API server took 6 % of a core from the stages.
RUN_POLL_S = 3.0
# Airflow's API shares two cores with the training stages; a slow answer now and then is no fault.
MAX_FAILED_POLLS = 30
LOG_LINES = 30
WIDE = 160


class DemoFailed(RuntimeError):
    """The demo did not reach its end; the message says why."""


FAILURES = (AirflowError, AirflowStartError, DemoFailed, ServiceDied, httpx.HTTPError)


class Demo:
    """One demo: Airflow, a run of the DAG, the board, the endpoint."""

    def __init__(self, options: argparse.Namespace, home: Path, console: Console) -> None:
        self._options = options
        self._home = home
        self._console = console
        self._services = Services(home)
        self._airflow = LocalAirflow(home, REPOSITORY / "dags", self._services)
        board_port, self._endpoint_port = free_ports(2)
        self._board_url = f"http://127.0.0.1:{board_port}"
        # A socket's path may be a hundred characters long, a home's may be more.
        self._sockets = tempfile.TemporaryDirectory(prefix="sailyard-")
        self._fork_server = Path(self._sockets.name) / "fork"
        self._airflow.environment |= {
            "SAILYARD_BOARD_URL": self._board_url,
            FORK_SERVER: str(self._fork_server),
        }
        self._board_port = board_port
        self._yard = Yard()
        self._run = ""
        self.can_stay = False
        """Whether Airflow and the board run, so that there is something to look at."""

    def run(self) -> None:
        """All of it, once.

        Raises:
            DemoFailed, ServiceDied, AirflowStartError, AirflowError: What went wrong.
        """
        self._start_airflow()
        self.can_stay = True
        self._run_pipeline()
        self._start_endpoint()
        self._print_results()

    def stay_up(self) -> None:
        """Wait for Ctrl-C. ServiceDied when a service ends before."""
        self._console.print("\nEverything stays up until Ctrl-C.")
        while True:
            self._services.check()
            time.sleep(POLL_S)

    def stop(self) -> None:
        """End every process of the demo."""
        self._airflow.stop()
        self._services.stop()
        self._sockets.cleanup()

    def _start_airflow(self) -> None:
        with self._status("Starting Airflow and the board"):
            # The board comes first, so that a running task's lineage link leads somewhere.
            self._start_board()
            self._start_fork_server()
            self._airflow.start(DAG_ID)
            client = self._airflow.client
            for run_id in client.active_runs(DAG_ID):
                # Left by a demo that was stopped; its finished stages are reused below.
                client.fail_run(DAG_ID, run_id)
            self._wait_until_up(f"{self._board_url}/_stcore/health", "the board")
        self._console.print(f"Airflow  {self._airflow.url}/dags/{DAG_ID}", highlight=False)
        self._console.print(f"Board    {self._board_url}", highlight=False)

    def _start_board(self) -> None:
        self._services.start(
            "board",
            [
                *(sys.executable, "-m", "dashboard"),
                *("--host", "127.0.0.1", "--port", str(self._board_port)),
            ],
            self._airflow.environment,
            self._home / "logs" / "board.log",
        )

    def _start_fork_server(self) -> None:
        stages = build_pipeline(load_recipe(self._options.recipe, self._options.set)).stages
        modules = sorted({stage.entry.partition(":")[0] for stage in stages})
        self._services.start(
            "fork server",
            [sys.executable, "-m", "sailyard.forkserver", str(self._fork_server), *modules],
            self._airflow.environment,
            self._home / "logs" / "fork-server.log",
        )

    def _run_pipeline(self) -> None:
        client = self._airflow.client
        client.set_paused(DAG_ID, False)
        run_id = client.trigger(DAG_ID, self._conf())
        recipe = load_recipe(self._options.recipe, self._options.set)
        stages = [stage.name for stage in build_pipeline(recipe).stages]
        with demo_view.StageView(self._console) as view:
            for instances in self._polls(run_id):
                view.update(stage_rows(stages, instances, self._states(run_id)))
        if client.run_state(DAG_ID, run_id) != "success":
            raise DemoFailed(self._why(run_id))

    def _states(self, run_id: str) -> dict[str, StageState]:
        """Stage name -> its state, once the DAG run has opened its pipeline run."""
        self._run = self._run or self._airflow.client.returned(DAG_ID, run_id, CREATE_RUN)
        states = stage_state(self._run, self._yard) if self._run else []
        return {state.stage: state for state in states}

    def _conf(self) -> dict[str, Any]:
        data = str(Path(self._options.data).resolve()) if self._options.data else ""
        return {"recipe": self._options.recipe, "overrides": self._options.set, "data": data}

    def _polls(self, run_id: str) -> Iterator[list[dict[str, Any]]]:
        """The run's task instances, every RUN_POLL_S until the run has ended."""
        client = self._airflow.client
        num_failed = 0
        while True:
            self._services.check()
            try:
                state = client.run_state(DAG_ID, run_id)
                yield client.task_instances(DAG_ID, run_id)
                num_failed = 0
            except httpx.HTTPError as error:
                num_failed += 1
                if num_failed > MAX_FAILED_POLLS:
                    raise DemoFailed(f"Airflow's API does not answer any more: {error}") from error
                state = "unknown"
            if state in ("success", "failed"):
                return
            time.sleep(RUN_POLL_S)

    def _why(self, run_id: str) -> str:
        """What failed, with the end of its log."""
        client = self._airflow.client
        parts = [f"The run failed. Airflow shows it at {self._airflow.url}/dags/{DAG_ID}"]
        for instance in client.task_instances(DAG_ID, run_id):
            if instance["state"] == "failed":
                name = instance["task_id"]
                log = stage_log(self._run, name, yard=self._yard) if self._run else ""
                log = log or client.task_log(DAG_ID, run_id, name, instance["try_number"])
                parts.append("\n".join([f"{name}:", *log.splitlines()[-LOG_LINES:]]))
        return "\n\n".join(parts)

    def _start_endpoint(self) -> None:
        with self._status("Starting the endpoint"):
            self._services.start(
                "endpoint",
                [
                    *(sys.executable, "-m", "sailyard", "serve"),
                    *("--host", "127.0.0.1", "--port", str(self._endpoint_port)),
                ],
                self._airflow.environment,
                self._home / "logs" / "endpoint.log",
            )
            self._wait_until_up(f"http://127.0.0.1:{self._endpoint_port}/ready", "the endpoint")

    def _wait_until_up(self, url: str, what: str) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            self._services.check()
            with suppress(httpx.HTTPError):
                if httpx.get(url, timeout=5.0, trust_env=False).is_success:
                    return
            if time.monotonic() > deadline:
                raise DemoFailed(f"{what} does not answer on {url}; its log is in {self._home}")
            time.sleep(0.3)

    def _print_results(self) -> None:
        if not self._console.is_terminal:
            output.console.width = WIDE  # a pipe has no width of its own
        for title, columns, rows in report_tables(build_report(self._yard, self._run)):
            output.print_table(title, columns, rows)
        self._console.print(f"Airflow  {self._airflow.url}/dags/{DAG_ID}", highlight=False)
        self._console.print(f"Board    {self._board_url}", highlight=False)
        self._console.print(f"Endpoint http://127.0.0.1:{self._endpoint_port}/v1", highlight=False)

    @contextmanager
    def _status(self, text: str) -> Iterator[None]:
        if self._console.is_terminal:
            with self._console.status(f"{text} ..."):
                yield
        else:
            self._console.print(f"{text} ...")
            yield


def stage_rows(
    stages: Sequence[str], instances: Sequence[dict[str, Any]], states: Mapping[str, StageState]
) -> list[demo_view.Row]:
    """One row a stage: what Airflow says of its task, and what the stage says of itself.

    Args:
        stages: Names in order.
        instances: Airflow's task instances of the run.
        states: Stage name -> its state in the run; empty until the run exists.
    """
    by_task = {instance["task_id"]: instance for instance in instances}
    return [_row(name, by_task.get(name), states.get(name)) for name in stages]


AIRFLOW_STATES = {
    "success": demo_view.DONE,
    "skipped": demo_view.SKIPPED,
    "failed": demo_view.FAILED,
    "upstream_failed": demo_view.NOT_REACHED,
    "running": demo_view.RUNNING,
}


def _row(name: str, instance: dict[str, Any] | None, state: StageState | None) -> demo_view.Row:
    word = (instance or {}).get("state")
    shown = AIRFLOW_STATES.get(word, word) if word else demo_view.WAITING
    if state is None or state.info is None:
        return demo_view.Row(name, shown)
    info = state.info
    if shown == demo_view.DONE and state.cached:
        return demo_view.Row(name, demo_view.CACHED)
    if shown != demo_view.RUNNING:
        return demo_view.Row(name, shown, info.seconds)
    share = f"{info.progress_done}/{info.progress_total} " if info.progress_total else ""
    seconds = (datetime.now(UTC) - info.started_at).total_seconds()
    return demo_view.Row(name, shown, seconds, f"{share}{info.progress_note}")


@contextmanager
def only_demo(home: Path) -> Iterator[None]:
    """Hold the home for this demo, and end what a killed one left behind.

    Raises:
        DemoFailed: Another demo runs on the home.
    """
    home.mkdir(parents=True, exist_ok=True)
    with (home / "demo.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DemoFailed(
                f"another demo runs on {home}; stop it, or set SAILYARD_HOME to another folder"
            ) from None
        end_processes(marked_processes(home), grace_s=10.0)
        yield


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m operators.demo", description=__doc__)
    parser.add_argument("--recipe", default="tiny", help="preset or recipe file")
    parser.add_argument("--set", action="append", default=[], metavar="a.b.c=value")
    parser.add_argument("--data", default="", help="your own images and captions")
    parser.add_argument("--exit", action="store_true", help="stop when all is done")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status: 0 done, 1 failed, 2 wrong input, 130 stopped."""
    options = parse_options(arguments)
    console = Console(soft_wrap=True)
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        load_recipe(options.recipe, options.set)
    except RecipeError as error:
        errors.print(str(error), markup=False)
        return 2
    if options.data and not Path(options.data).exists():
        errors.print(f"there is nothing at {options.data}", markup=False)
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        with only_demo(get_settings().home):
            demo = Demo(options, get_settings().home, console)
            return _run(demo, not options.exit, console, errors)
    except DemoFailed as error:
        errors.print(str(error), markup=False)
        return 1


def _run(demo: Demo, stay: bool, console: Console, errors: Console) -> int:
    status = 130
    try:
        try:
            demo.run()
            status = 0
        except FAILURES as error:
            errors.print(f"\n{error}", markup=False)
            status = 1
        if stay and demo.can_stay:
            demo.stay_up()
    except KeyboardInterrupt:
        # Ctrl-C is how a demo that stays up ends; before that it is an interruption.
        pass
    except ServiceDied as error:
        errors.print(f"\n{error}", markup=False)
        status = 1
    finally:
        # From here on nothing may stop the stopping.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        console.print("Stopping ...")
        demo.stop()
    return status


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
