"""What the pages ask the ground floor for. Everything that touches a database or store is here."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import streamlit as st

from sailyard.artifacts import Artifact, ArtifactError, StoreError
from sailyard.lineage import ArtifactNode, NotInLineage, RunInfo, StageRunInfo, queries
from sailyard.runs import RunError, StageState, stage_log, stage_state
from sailyard.samples import Sample, read_samples
from sailyard.settings import Settings, get_settings
from sailyard.yard import Yard

# What a store or database that is away, or does not have the thing, may raise. All of these say
# what to do, so a page shows the message and stays up.
UNAVAILABLE = (ArtifactError, StoreError, NotInLineage, RunError)


def yard() -> Yard:
    """The yard that the environment names, opened once per place."""
    settings = get_settings()
    return _open(f"{settings.home}|{settings.store}|{settings.database_url}", settings)


@st.cache_resource(max_entries=4, show_spinner=False)
def _open(place: str, _settings: Settings) -> Yard:
    return Yard(_settings)


def runs(limit: int = 100) -> list[RunInfo]:
    """The newest runs, newest first."""
    return queries.list_runs(yard().database, limit)


def stages(run_id: str) -> list[StageState]:
    """Every stage of a run in pipeline order, pending ones too."""
    return stage_state(run_id, yard())


def stage(run_id: str, name: str) -> StageRunInfo | None:
    """One stage of a run, or None when it has not started."""
    return queries.stage_run(yard().database, run_id, name)


def log_tail(run_id: str, name: str, max_bytes: int = 64 * 1024) -> str:
    """The end of a stage's log."""
    return stage_log(run_id, name, max_bytes, yard())


def summary(run_id: str, name: str) -> dict[str, Any]:
    """A finished stage's final figures; empty while there are none."""
    found = stage(run_id, name)
    return found.summary if found is not None and found.status == "finished" else {}


def output(run_id: str, name: str, output_name: str) -> str | None:
    """Digest of what a stage of a run made, or None."""
    found = stage(run_id, name)
    return found.outputs.get(output_name) if found is not None else None


def artifact(digest: str) -> Artifact:
    """An artifact's manifest; it never changes, so it is asked for once."""
    return _artifact(digest, yard().settings.store)


@st.cache_data(max_entries=500, show_spinner=False)
def _artifact(digest: str, place: str) -> Artifact:
    return yard().artifacts.get(digest)


def folder(digest: str) -> Path:
    """A verified local copy of an artifact."""
    with st.spinner("Fetching the artifact…"):
        return yard().artifacts.fetch(digest)


def read_json(digest: str, name: str) -> dict[str, Any]:
    """A JSON file inside an artifact."""
    content: dict[str, Any] = json.loads((folder(digest) / name).read_text(encoding="utf-8"))
    return content


def first_samples(digest: str, count: int) -> list[Sample]:
    """The first samples of a dataset artifact."""
    return list(islice(read_samples(folder(digest)), count))


def nodes_of_run(run_id: str) -> dict[str, str]:
    """Everything a run made so far: "stage/output" -> digest, in pipeline order."""
    return {
        f"{state.stage}/{name}": digest
        for state in stages(run_id)
        if state.info is not None
        for name, digest in state.info.outputs.items()
    }


def find_artifact(prefix: str) -> ArtifactNode:
    """The artifact whose digest starts so.

    Raises:
        NotInLineage: None or several do.
    """
    return queries.find_artifact(yard().database, prefix)
