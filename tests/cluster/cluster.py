"""What the suite does to a cluster: through kubectl and helm, as people do."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from operators.airflow_client import AirflowClient
from operators.processes import free_ports
from sailyard.cluster import RUN_LABEL, STAGE_LABEL
from tests.tools import tool

RELEASE = "yard"
NAME = "yard-sailyard"
CHART = Path(__file__).parents[2] / "helm" / "sailyard"
DAG = "sail_vl2"
JSON = dict[str, Any]


class Cluster:
    """One namespace of the cluster that KUBECONFIG names."""

    def __init__(self, namespace: str, values: Path) -> None:
        self.namespace, self.values = namespace, values

    # --- kubectl and helm ----------------------------------------------------------------------

    def kubectl(self, *arguments: str, stdin: str = "", seconds: float = 120) -> str:
        return self._run(tool("kubectl"), "-n", self.namespace, *arguments, stdin=stdin, s=seconds)

    def helm(self, *arguments: str, seconds: float = 900) -> str:
        return self._run(tool("helm"), *arguments, "-n", self.namespace, s=seconds)

    def get(self, kind: str, *arguments: str) -> list[JSON]:
        found = json.loads(self.kubectl("get", kind, *arguments, "-o", "json"))
        return list(found["items"]) if "items" in found else [found]

    def install(self, verb: str, *flags: str) -> None:
        files = (self.values, Path(__file__).with_name("values.yaml"))
        values = [word for file in files for word in ("--values", str(file))]
        self.helm(verb, RELEASE, str(CHART), *values, "--wait", "--timeout", "15m", *flags)

    def inside(self, *command: str, seconds: float = 120) -> str:
        """Run a command in the scheduler's pod: it has the yard's keys and all commands."""
        pod = f"{NAME}-scheduler-0"
        return self.kubectl("exec", pod, "-c", "scheduler", "--", *command, seconds=seconds)

    def python(self, code: str, seconds: float = 120) -> Any:
        """Run Python there; returns the JSON that it prints on its last line."""
        said = self.inside("python", "-c", code, seconds=seconds)
        return json.loads(said.strip().splitlines()[-1])

    def _run(self, program: Path, *arguments: str, stdin: str = "", s: float = 120) -> str:
        done = subprocess.run(
            [str(program), *arguments], input=stdin, capture_output=True, text=True, timeout=s
        )
        if done.returncode:
            raise RuntimeError(f"{program.name} {' '.join(arguments)}: {done.stderr[-2000:]}")
        return done.stdout

    # --- stages --------------------------------------------------------------------------------

    def jobs(self, run: str = "") -> dict[str, JSON]:
        """Stage -> its newest Job, of one run or of any."""
        found = self.get("jobs", "-l", f"{RUN_LABEL}={run}" if run else STAGE_LABEL)
        found.sort(key=lambda job: job["metadata"]["creationTimestamp"])
        return {job["metadata"]["annotations"][STAGE_LABEL]: job for job in found}

    def stage_pods(self, stage: str, run: str = "") -> list[JSON]:
        of_run = f",{RUN_LABEL}={run}" if run else ""
        found = self.get("pods", "-l", f"{STAGE_LABEL}={stage}{of_run}")
        return sorted(found, key=lambda pod: pod["metadata"]["creationTimestamp"])

    def running_pod(self, stage: str, seconds: float = 2400) -> str:
        """Name of a pod of the stage that has begun to log steps."""

        def in_phase(*phases: str) -> list[str]:
            pods = reversed(self.stage_pods(stage))
            return [p["metadata"]["name"] for p in pods if p["status"]["phase"] in phases]

        def stepping() -> str:
            running = in_phase("Running")
            return next((name for name in running if " 1/" in self.kubectl("logs", name)), "")

        # Steps of a small recipe pass in a second; looking that often until the stage's turn comes
        # would take a core from the stages before it.
        wait_for(f"a pod of {stage}", lambda: in_phase("Pending", "Running"), seconds, pause=4)
        return str(wait_for(f"steps of {stage}", stepping, seconds, pause=0.5))

    def evict(self, pod: str) -> None:
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": pod, "namespace": self.namespace},
        }
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}/eviction"
        self.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(body))

    # --- Airflow -------------------------------------------------------------------------------

    @contextmanager
    def forward(self, service: str, port: int) -> Iterator[str]:
        """An address of this machine that leads to a Service's pod."""
        (local,) = free_ports(1)
        what = ["port-forward", f"svc/{NAME}-{service}", f"{local}:{port}"]
        process = subprocess.Popen(
            [str(tool("kubectl")), "-n", self.namespace, *what],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for(f"a way to {service}", lambda: _listens(local), 30, pause=0.2)
            yield f"http://127.0.0.1:{local}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()

    @contextmanager
    def airflow(self) -> Iterator[AirflowClient]:
        (secret,) = self.get("secret", f"{NAME}-airflow-login")
        password = json.loads(base64.b64decode(secret["data"]["passwords.json"]))["admin"]
        with self.forward("api-server", 8080) as url:
            client = AirflowClient(url)
            client.login("admin", password)
            yield client
            client.close()

    def run(
        self,
        recipe: str,
        overrides: list[str],
        during: Callable[[AirflowClient, str], None] | None = None,
        **conf: Any,
    ) -> str:
        """Trigger the DAG on the cluster, wait for its success; returns the pipeline run."""
        with self.airflow() as client:
            client.set_paused(DAG, False)
            asked = {"recipe": recipe, "overrides": overrides, "launcher": "kubernetes", **conf}
            dag_run = client.trigger(DAG, asked)
            if during is not None:
                during(client, dag_run)
        limit = float(os.environ.get("SAILYARD_TEST_RUN_SECONDS", "5400"))
        state = wait_for("the run", lambda: self.ended(dag_run), limit, pause=5)
        with self.airflow() as client:
            bad = [
                (t["task_id"], t["state"])
                for t in client.task_instances(DAG, dag_run)
                if t["state"] not in ("success", "skipped")
            ]
            assert state == "success", bad
            return client.returned(DAG, dag_run, "create_run")

    def ended(self, dag_run: str) -> str:
        # A forwarded port dies with its pod; a new one a look lives through restarts.
        try:
            with self.airflow() as client:
                state = client.run_state(DAG, dag_run)
        except (httpx.HTTPError, RuntimeError, TimeoutError):
            return ""
        return state if state in ("success", "failed") else ""

    # --- outcomes ------------------------------------------------------------------------------

    def outputs(self, run: str) -> dict[str, dict[str, str]]:
        """Stage -> output -> digest, of a whole run."""
        code = (
            "import json; from sailyard.runs import stage_state; from sailyard.yard import Yard; "
            "from sailyard.runs import stage_result; yard = Yard()\n"
            f"print(json.dumps({{s.stage: dict(stage_result({run!r}, s.stage, yard).outputs) "
            f"for s in stage_state({run!r}, yard)}}))"
        )
        found: dict[str, dict[str, str]] = self.python(code)
        return found

    def first_steps(self, run: str) -> dict[str, str]:
        """Stage -> when its first step was entered, ISO 8601, of those that log a loss."""
        code = (
            "import json; from sqlalchemy import text; from sailyard.yard import Yard\n"
            "with Yard().database.read() as session:\n"
            "    rows = session.execute(text('select s.stage, min(m.at) from metrics m join "
            "stage_runs s on s.id = m.stage_run_id where s.run_id = :run and m.name like :name "
            f"group by s.stage'), {{'run': {run!r}, 'name': '%loss'}}).all()\n"
            "print(json.dumps({stage: str(at) for stage, at in rows}))"
        )
        found: dict[str, str] = self.python(code)
        return found


def wait_for(what: str, look: Callable[[], Any], seconds: float = 300, pause: float = 1.0) -> Any:
    """What ``look`` returns once that is true."""
    until = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(pause)
    return found


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
