"""Airflow's components on one machine, on loopback, with all state in one folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx

from operators.airflow_client import AirflowClient
from operators.processes import MARKER, Service, Services, free_ports, tail

# Airflow's public API writes its audit log on the event loop. On SQLite such a write can wait for
# a task's write whose commit waits for that very loop, until one of them times out: so tasks have
# an API server of their own.
COMPONENTS = {
    "api-server": ["api-server", "--apps", "core"],
    "task-api-server": ["api-server", "--apps", "execution"],
    "dag-processor": ["dag-processor"],
    # The log servers would listen on every interface; the API server reads the files.
    "triggerer": ["triggerer", "--skip-serve-logs"],
    "scheduler": ["scheduler", "--skip-serve-logs"],
}
HEALTH_NAMES = ("metadatabase", "scheduler", "dag_processor", "triggerer")
START_TIMEOUT_S = 300.0


class AirflowStartError(RuntimeError):
    """Airflow did not come up; the message says which part and shows its log."""


def airflow_environment(home: Path, dags_folder: Path, port: int, task_port: int) -> dict[str, str]:
    """The variables that make the components one small private Airflow.

    Few processes that sleep when they have nothing to do: cores and memory belong to the stages.
    """
    url = f"http://127.0.0.1:{port}"
    airflow = {
        "CORE__DAGS_FOLDER": str(dags_folder),
        "CORE__EXECUTOR": "LocalExecutor",
        "CORE__LOAD_EXAMPLES": "False",
        "CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "CORE__DAGBAG_IMPORT_TIMEOUT": "180",
        # Two stages on the same cores wait for each other's threads by spinning: each then takes
        # many times as long as alone (docs/log.md).
        "CORE__PARALLELISM": "1",
        "CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{task_port}/execution/",
        "CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(home / "airflow" / "passwords.json"),
        "API__HOST": "127.0.0.1",
        "API__PORT": str(port),
        "API__BASE_URL": url,
        "API__WORKERS": "1",
        "API__INSTANCE_NAME": "Sailyard",
        # Components wait for each other's writes instead of failing on a locked database.
        "DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow/airflow.db?timeout=60",
        "DAG_PROCESSOR__PARSING_PROCESSES": "1",
        "DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "120",
        "DAG_PROCESSOR__DAG_FILE_PROCESSOR_TIMEOUT": "180",
        # Training keeps every core busy; a late answer or heartbeat is no reason to give up.
        "WORKERS__EXECUTION_API_TIMEOUT": "60",
        "WORKERS__MAX_FAILED_HEARTBEATS": "10",
        # A worker that misses its task's end sees it at the next heartbeat, by default after 5 s.
        "WORKERS__MIN_HEARTBEAT_INTERVAL": "2",
        # A round takes 50 ms of a core; at ten a second the scheduler alone held a quarter of one.
        "SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "1.5",
        "SCHEDULER__POOL_METRICS_INTERVAL": "60",
        "SCHEDULER__ENABLE_HEALTH_CHECK": "False",
        # A killed demo leaves running tasks behind; the next one must not wait minutes for them.
        "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "60",
    }
    # Another Airflow's settings in the caller's environment are not for this one.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("AIRFLOW_")}
    direct = ",".join(filter(None, ["127.0.0.1,localhost", os.environ.get("NO_PROXY")]))
    return {
        **inherited,
        "AIRFLOW_HOME": str(home / "airflow"),
        **{f"AIRFLOW__{key}": value for key, value in airflow.items()},
        "SAILYARD_HOME": str(home),
        MARKER: str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        # Airflow renames its processes; by default that overwrites the environment which shows
        # that a process is ours.
        "SPT_NOENV": "1",
        "NO_PROXY": direct,
        "no_proxy": direct,
        "PYTHONUNBUFFERED": "1",
    }


class LocalAirflow:
    """One private Airflow. The caller owns ``services`` and stops them."""

    def __init__(self, home: Path, dags_folder: Path, services: Services) -> None:
        self._services = services
        port, self._task_port = free_ports(2)
        self.url = f"http://127.0.0.1:{port}"
        self.environment = airflow_environment(home, dags_folder, port, self._task_port)
        self.logs = home / "airflow" / "logs"
        self.client = AirflowClient(self.url)
        self._scheduler: Service | None = None

    def start(self, dag_id: str) -> None:
        """Migrate the database, start the components, wait until ``dag_id`` can be triggered.

        Raises:
            AirflowStartError: a component is not healthy in time, or a DAG file does not import.
            ServiceDied: a component ended.
        """
        self._migrate()
        for component, arguments in COMPONENTS.items():
            port = ["--port", str(self._task_port)] if component == "task-api-server" else []
            service = self._services.start(
                f"airflow {component}",
                [sys.executable, "-m", "airflow", *arguments, *port],
                self.environment,
                self.logs / f"{component}.log",
            )
            if component == "scheduler":
                self._scheduler = service
        self._wait_healthy()
        self.client.login()
        self._wait_for_dag(dag_id)

    def stop(self) -> None:
        """End the scheduler and its tasks while the API server can still take down their state.

        The other components end with the services.
        """
        self.client.close()
        if self._scheduler is not None:
            self._services.stop_one(self._scheduler, grace_s=15.0)
            self._scheduler = None

    def _migrate(self) -> None:
        log = self.logs / "migrate.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as sink:
            done = subprocess.run(
                [sys.executable, "-m", "airflow", "db", "migrate"],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode != 0:
            raise AirflowStartError(f"`airflow db migrate` failed; {log} ends with:\n{tail(log)}")

    def _wait_healthy(self) -> None:
        warm = False
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            self._services.check()
            health = self.client.health()
            healthy = all(health.get(name) == "healthy" for name in HEALTH_NAMES)
            # Asked as soon as there is an answer at all: it overlaps with the other components.
            warm = warm or (bool(health) and self._task_api_is_warm())
            if healthy and warm:
                return
            if time.monotonic() > deadline:
                raise AirflowStartError(
                    f"Airflow is not healthy after {START_TIMEOUT_S:.0f} s: {json.dumps(health)}; "
                    f"its logs are in {self.logs}"
                )
            time.sleep(0.3)

    def _task_api_is_warm(self) -> bool:
        """Whether the API that tasks speak is ready; its first request builds it, in seconds."""
        url = f"http://127.0.0.1:{self._task_port}/execution/health"
        try:
            return httpx.get(url, timeout=120.0, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    def _wait_for_dag(self, dag_id: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.client.dag_is_known(dag_id):
            self._services.check()
            errors = self.client.import_errors()
            if errors or time.monotonic() > deadline:
                why = "\n".join(errors) or f"not parsed within {START_TIMEOUT_S:.0f} s"
                raise AirflowStartError(f"Airflow does not know the DAG {dag_id}: {why}")
            time.sleep(0.3)
