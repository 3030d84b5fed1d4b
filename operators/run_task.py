"""The task that opens a pipeline run for a DAG run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sailyard.runs import create_run

CREATE_RUN = "create_run"
"""Id of the task; what it returns is the run id that every stage task works on."""


def create_run_from_params(params: Mapping[str, Any]) -> str:
    """Create the pipeline run that the DAG's form asks for; returns its id."""
    return create_run(
        params["recipe"],
        params["overrides"],
        start_from=params["start_from"] or None,
        force=params["force"],
        data=params["data"] or None,
    )
