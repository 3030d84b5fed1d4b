"""The few calls of Airflow's REST API that Sailyard needs."""

from __future__ import annotations

from typing import Any

import httpx


class AirflowError(RuntimeError):
    """Airflow refused a request; the message holds its answer."""


class AirflowClient:
    """A client of one Airflow with SimpleAuthManager."""

    def __init__(self, base_url: str, timeout_s: float = 150.0) -> None:
        # Longer than Airflow itself waits for SQLite's lock (60 s), twice over: on a busy machine
        # a request that is about to be answered must not end a run of many minutes.
        self.base_url = base_url
        # Loopback only: a proxy from the environment must not be asked.
        self._http = httpx.Client(base_url=base_url, timeout=timeout_s, trust_env=False)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def health(self) -> dict[str, str]:
        """Status ("healthy" or not) of each component; empty while the API does not answer."""
        try:
            answer = self._http.get("/api/v2/monitor/health")
            answer.raise_for_status()
        except httpx.HTTPError:
            return {}
        return {name: (state or {}).get("status") or "" for name, state in answer.json().items()}

    def login(self, username: str = "", password: str = "") -> None:
        """Fetch a token; needed once, before any call below.

        Without a name as the user of an Airflow where all are admins.
        """
        if username:
            body = {"username": username, "password": password}
            token = self.call("POST", "/auth/token", body)["access_token"]
        else:
            token = self.call("GET", "/auth/token")["access_token"]
        self._http.headers["Authorization"] = f"Bearer {token}"

    def dag_is_known(self, dag_id: str) -> bool:
        """True once the DAG processor has stored the DAG."""
        answer = self._http.get(f"/api/v2/dags/{dag_id}")
        return answer.status_code == httpx.codes.OK and not answer.json().get("is_stale")

    def import_errors(self) -> list[str]:
        """Why DAG files could not be read, one text a file."""
        errors = self.call("GET", "/api/v2/importErrors")["import_errors"]
        return [f"{error['filename']}: {error['stack_trace']}" for error in errors]

    def set_paused(self, dag_id: str, paused: bool) -> None:
        """Pause or unpause a DAG."""
        self.call("PATCH", f"/api/v2/dags/{dag_id}", {"is_paused": paused})

    def trigger(self, dag_id: str, conf: dict[str, Any]) -> str:
        """Start a run now; returns its run id."""
        body = {"logical_date": None, "conf": conf}
        return str(self.call("POST", f"/api/v2/dags/{dag_id}/dagRuns", body)["dag_run_id"])

    def run_state(self, dag_id: str, run_id: str) -> str:
        """State of a run: queued, running, success or failed."""
        return str(self.call("GET", f"/api/v2/dags/{dag_id}/dagRuns/{run_id}")["state"])

    def active_runs(self, dag_id: str) -> list[str]:
        """Ids of the runs that are queued or running."""
        path = f"/api/v2/dags/{dag_id}/dagRuns?state=queued&state=running"
        return [run["dag_run_id"] for run in self.call("GET", path)["dag_runs"]]

    def fail_run(self, dag_id: str, run_id: str) -> None:
        """Mark a run as failed, which ends its tasks."""
        self.call("PATCH", f"/api/v2/dags/{dag_id}/dagRuns/{run_id}", {"state": "failed"})

    def task_instances(self, dag_id: str, run_id: str) -> list[dict[str, Any]]:
        """The task instances of a run, as Airflow describes them."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances?limit=200"
        return list(self.call("GET", path)["task_instances"])

    def returned(self, dag_id: str, run_id: str, task_id: str) -> str:
        """What a task returned, as text; "" while it has not."""
        path = (
            f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}"
            "/xcomEntries/return_value"
        )
        answer = self._http.get(path)
        if answer.status_code == httpx.codes.NOT_FOUND:
            return ""
        answer.raise_for_status()
        return str(answer.json()["value"])

    def answer_approval(self, dag_id: str, run_id: str, task_id: str, option: str) -> None:
        """Answer a task that waits for a human with one of its options."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/-1/hitlDetails"
        self.call("PATCH", path, {"chosen_options": [option], "params_input": {}})

    def task_log(self, dag_id: str, run_id: str, task_id: str, try_number: int) -> str:
        """The log of one try of a task as plain lines."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/logs/{try_number}"
        content = self.call("GET", f"{path}?full_content=true")["content"]
        return "\n".join(str(line.get("event", "")) for line in content)

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Any request; returns the JSON object of the answer.

        Raises:
            AirflowError: Airflow refused it.
        """
        answer = self._http.request(method, path, json=body)
        if answer.is_error:
            raise AirflowError(f"{method} {path}: {answer.status_code} {answer.text[:500]}")
        return dict(answer.json()) if answer.content else {}
