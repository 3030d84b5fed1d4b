"""What the board, the CLI and the report ask. Answers are plain frozen records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from sailyard.lineage.database import Database
from sailyard.lineage.schema import (
    Artifact,
    Event,
    Metric,
    Run,
    StageInput,
    StageOutput,
    StageRun,
    utc_now,
)

BETWEEN_STAGES = timedelta(minutes=2)
"""A run of which no stage runs is still under way for so long."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A run and how far it is."""

    id: str
    recipe_name: str
    status: str
    """created | running | finished | failed | stopped (on request, or for want of a sign)"""
    created_at: datetime
    updated_at: datetime
    num_stages: int
    num_finished: int
    num_cached: int
    num_failed: int
    overrides: tuple[str, ...]
    start_from: str
    force: bool


@dataclass(frozen=True, slots=True)
class StageRunInfo:
    """A stage of a run, with what it read and made."""

    id: int
    run_id: str
    stage: str
    status: str
    """running | finished | failed | stopped | lost"""
    cached: bool
    cache_key: str
    attempt: int
    host: str
    pid: int
    started_at: datetime
    heartbeat_at: datetime
    finished_at: datetime | None
    seconds: float
    computed_seconds: float
    progress_done: int
    progress_total: int
    progress_note: str
    error: str
    source_run_id: str
    summary: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]


@dataclass(frozen=True, slots=True)
class ArtifactNode:
    """An artifact in an ancestry graph."""

    digest: str
    kind: str
    size: int
    stage: str
    """Stage that makes it; "" when unknown."""
    run_id: str
    """First run in which that happened."""


@dataclass(frozen=True, slots=True)
class AncestryEdge:
    """``stage`` read ``source`` as ``input`` and made ``target`` as ``output``."""

    source: str
    target: str
    stage: str
    input: str
    output: str


@dataclass(frozen=True, slots=True)
class Ancestry:
    """Artifacts related to one, and how."""

    root: str
    nodes: tuple[ArtifactNode, ...]
    edges: tuple[AncestryEdge, ...]
    truncated: bool


@dataclass(frozen=True, slots=True)
class EventInfo:
    """Something that happened."""

    id: int
    at: datetime
    run_id: str
    stage: str
    kind: str
    detail: dict[str, Any]


class NotInLineage(ValueError):
    """A run, stage or artifact the database does not know."""


def list_runs(database: Database, limit: int = 50) -> list[RunInfo]:
    """The newest runs, newest first."""
    with database.read() as session:
        query = select(Run).order_by(Run.created_at.desc(), Run.id.desc()).limit(limit)
        runs = session.scalars(query).all()
        return _run_infos(session, runs)


def get_run(database: Database, run_id: str) -> RunInfo:
    """One run.

    Raises:
        NotInLineage: There is no such run.
    """
    with database.read() as session:
        run = session.get(Run, run_id)
        if run is None:
            raise NotInLineage(f"there is no run {run_id!r}; `sailyard status` lists them")
        return _run_infos(session, [run])[0]


def latest_run(database: Database) -> RunInfo | None:
    """The newest run, or None."""
    runs = list_runs(database, limit=1)
    return runs[0] if runs else None


def run_recipe(database: Database, run_id: str) -> dict[str, Any]:
    """The resolved recipe of a run, as JSON types.

    Raises:
        NotInLineage: There is no such run.
    """
    with database.read() as session:
        run = session.get(Run, run_id)
        if run is None:
            raise NotInLineage(f"there is no run {run_id!r}; `sailyard status` lists them")
        return dict(run.recipe)


def stage_runs(database: Database, run_id: str) -> list[StageRunInfo]:
    """Every stage of a run that has started or was reused, in order of start."""
    with database.read() as session:
        query = select(StageRun).where(StageRun.run_id == run_id)
        return _stage_infos(session, query.order_by(StageRun.started_at, StageRun.id))


def stage_run(database: Database, run_id: str, stage: str) -> StageRunInfo | None:
    """One stage of a run, or None when it has not started."""
    with database.read() as session:
        query = select(StageRun).where(StageRun.run_id == run_id, StageRun.stage == stage)
        found = _stage_infos(session, query)
        return found[0] if found else None


def metric_names(database: Database, run_id: str, stage: str) -> list[str]:
    """Names of the series a stage of a run has."""
    with database.read() as session:
        owner = _series_owner(session, run_id, stage)
        query = select(Metric.name).where(Metric.stage_run_id == owner).distinct()
        return sorted(session.scalars(query))


def metric_series(
    database: Database,
    run_id: str,
    stage: str,
    names: Sequence[str] | None = None,
    max_points: int = 2000,
) -> dict[str, list[tuple[int, float | None]]]:
    """Series name -> (step, value) by step; None stands for NaN.

    A reused stage shows the series of the run that computed it. A series longer than
    ``max_points`` is thinned evenly and keeps its last point.
    """
    with database.read() as session:
        owner = _series_owner(session, run_id, stage)
        query = select(Metric.name, Metric.step, Metric.value).where(Metric.stage_run_id == owner)
        if names is not None:
            query = query.where(Metric.name.in_(list(names)))
        series: dict[str, list[tuple[int, float | None]]] = {}
        for name, step, value in session.execute(query.order_by(Metric.name, Metric.step)):
            series.setdefault(name, []).append((step, value))
    return {name: _thin(points, max_points) for name, points in series.items()}


def find_artifact(database: Database, prefix: str) -> ArtifactNode:
    """The artifact whose digest starts so.

    Raises:
        NotInLineage: None does, or several do.
    """
    wanted = prefix.lower()
    if not wanted or set(wanted) - set("0123456789abcdef"):
        raise NotInLineage(f"{prefix!r} is not a digest; digests are hexadecimal")
    with database.read() as session:
        # A range over the primary key: LIKE would scan the table on PostgreSQL.
        query = select(Artifact.digest).where(
            Artifact.digest >= wanted, Artifact.digest <= wanted.ljust(64, "f")
        )
        digests = session.scalars(query.limit(2)).all()
        if len(digests) != 1:
            problem = "several artifacts start with" if digests else "no artifact starts with"
            raise NotInLineage(f"{problem} {prefix!r}; give more of the digest, or another")
        return _nodes(session, digests)[0]


def ancestry(
    database: Database,
    digest: str,
    direction: Literal["up", "down", "both"] = "up",
    max_nodes: int = 500,
) -> Ancestry:
    """What an artifact was made from ("up"), what was made from it ("down"), or both."""
    edges: dict[AncestryEdge, None] = {}
    seen = {digest: None}
    truncated = False
    with database.read() as session:
        for upwards in (True, False):
            if direction == ("down" if upwards else "up"):
                continue
            walked = {digest}
            frontier = {digest}
            while frontier:
                found = _edges(session, frontier, upwards)
                edges |= dict.fromkeys(found)
                ends = {edge.source if upwards else edge.target for edge in found}
                frontier = ends - walked
                if len(seen) + len(frontier) > max_nodes:
                    truncated = True
                    break
                walked |= frontier
                seen |= dict.fromkeys(sorted(frontier))
        nodes = _nodes(session, list(seen))
    kept = tuple(edge for edge in edges if edge.source in seen and edge.target in seen)
    return Ancestry(digest, tuple(nodes), kept, truncated)


def list_artifacts(database: Database, kind: str = "", limit: int = 100) -> list[ArtifactNode]:
    """The newest artifacts, all or of one kind."""
    with database.read() as session:
        query = select(Artifact.digest).order_by(Artifact.created_at.desc(), Artifact.digest)
        if kind:
            query = query.where(Artifact.kind == kind)
        return _nodes(session, session.scalars(query.limit(limit)).all())


def events(database: Database, run_id: str = "", limit: int = 100) -> list[EventInfo]:
    """The newest events, of one run or of all, newest first."""
    with database.read() as session:
        query = select(Event).order_by(Event.id.desc()).limit(limit)
        if run_id:
            query = query.where(Event.run_id == run_id)
        return [
            EventInfo(row.id, row.at, row.run_id, row.stage, row.kind, dict(row.detail))
            for row in session.scalars(query)
        ]


def _run_infos(session: Session, runs: Sequence[Run]) -> list[RunInfo]:
    counts: dict[str, dict[tuple[str, bool], int]] = {}
    updated: dict[str, datetime] = {}
    query = (
        select(
            StageRun.run_id,
            StageRun.status,
            StageRun.cached,
            func.count(),
            func.max(StageRun.heartbeat_at),
        )
        .where(StageRun.run_id.in_([run.id for run in runs]))
        .group_by(StageRun.run_id, StageRun.status, StageRun.cached)
    )
    for run_id, status, cached, count, latest in session.execute(query):
        counts.setdefault(run_id, {})[status, cached] = count
        updated[run_id] = max(latest, updated.get(run_id, latest))
    return [_run_info(run, counts.get(run.id, {}), updated.get(run.id)) for run in runs]


def _run_info(
    run: Run, counts: dict[tuple[str, bool], int], updated_at: datetime | None
) -> RunInfo:
    by_status: dict[str, int] = {}
    for (status, _), count in counts.items():
        by_status[status] = by_status.get(status, 0) + count
    finished = by_status.get("finished", 0)
    if by_status.get("running"):
        status = "running"
    elif by_status.get("failed"):
        status = "failed"
    elif finished >= run.num_stages:
        status = "finished"
    elif not by_status:
        status = "created"
    else:
        # Between two stages nothing runs for a moment.
        halted = by_status.get("stopped") or by_status.get("lost")
        quiet = updated_at is None or utc_now() - updated_at > BETWEEN_STAGES
        status = "stopped" if halted or quiet else "running"
    return RunInfo(
        id=run.id,
        recipe_name=run.recipe_name,
        status=status,
        created_at=run.created_at,
        updated_at=updated_at or run.created_at,
        num_stages=run.num_stages,
        num_finished=finished,
        num_cached=counts.get(("finished", True), 0),
        num_failed=by_status.get("failed", 0),
        overrides=tuple(run.overrides),
        start_from=run.start_from,
        force=run.force,
    )


def _stage_infos(session: Session, query: Any) -> list[StageRunInfo]:
    rows: Sequence[StageRun] = session.scalars(query).all()
    ids = [row.id for row in rows]
    inputs = _links(session, StageInput, ids)
    outputs = _links(session, StageOutput, ids)
    columns = [column.name for column in StageRun.__table__.columns]
    return [
        StageRunInfo(
            **{name: getattr(row, name) for name in columns},
            inputs=inputs.get(row.id, {}),
            outputs=outputs.get(row.id, {}),
        )
        for row in rows
    ]


def _links(
    session: Session, table: type[StageInput] | type[StageOutput], ids: Sequence[int]
) -> dict[int, dict[str, str]]:
    links: dict[int, dict[str, str]] = {}
    query = select(table.stage_run_id, table.name, table.digest).where(table.stage_run_id.in_(ids))
    for stage_run_id, name, digest in session.execute(query):
        links.setdefault(stage_run_id, {})[name] = digest
    return links


def _series_owner(session: Session, run_id: str, stage: str) -> int | None:
    """Id of the stage run whose series show this stage: its own, or its source's if reused."""
    query = select(StageRun).where(StageRun.run_id == run_id, StageRun.stage == stage)
    row = session.scalars(query).one_or_none()
    if row is None or not row.cached:
        return row.id if row else None
    source = select(StageRun).where(
        StageRun.run_id == row.source_run_id,
        StageRun.stage == stage,
        StageRun.cache_key == row.cache_key,
    )
    found = session.scalars(source).one_or_none()
    return found.id if found else row.id


def _edges(session: Session, digests: Iterable[str], upwards: bool) -> list[AncestryEdge]:
    """Edges that end in (upwards) or start from the digests; equal ones of several runs are one."""
    near = StageOutput.digest if upwards else StageInput.digest
    query = (
        select(
            StageInput.digest, StageOutput.digest, StageRun.stage, StageInput.name, StageOutput.name
        )
        .join(StageRun, StageRun.id == StageInput.stage_run_id)
        .join(StageOutput, StageOutput.stage_run_id == StageInput.stage_run_id)
        .where(near.in_(list(digests)))
        .distinct()
    )
    found = [AncestryEdge(*row) for row in session.execute(query)]
    return sorted(found, key=lambda edge: (edge.stage, edge.input, edge.output, edge.source))


def _nodes(session: Session, digests: Sequence[str]) -> list[ArtifactNode]:
    known = {
        row.digest: row
        for row in session.scalars(select(Artifact).where(Artifact.digest.in_(digests)))
    }
    makers: dict[str, tuple[str, str]] = {}
    query = (
        select(StageOutput.digest, StageRun.stage, StageRun.run_id)
        .join(StageRun, StageRun.id == StageOutput.stage_run_id)
        .where(StageOutput.digest.in_(digests))
        .order_by(StageRun.id)
    )
    for digest, stage, run_id in session.execute(query):
        makers.setdefault(digest, (stage, run_id))
    nodes = []
    for digest in digests:
        row = known.get(digest)
        stage, run_id = makers.get(digest, ("", ""))
        size, kind = (row.size, row.kind) if row else (0, "unknown")
        nodes.append(ArtifactNode(digest, kind, size, stage, run_id))
    return nodes


def _thin(
    points: list[tuple[int, float | None]], max_points: int
) -> list[tuple[int, float | None]]:
    if len(points) <= max_points:
        return points
    stride = -(-len(points) // max_points)
    thinned = points[::stride]
    return thinned if thinned[-1] == points[-1] else [*thinned, points[-1]]
