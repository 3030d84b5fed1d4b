"""What the stage contract writes down. Every function is one short transaction."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from sailyard.lineage.database import Database
from sailyard.lineage.schema import (
    Artifact,
    Base,
    Event,
    Metric,
    Run,
    StageInput,
    StageOutput,
    StageRun,
    utc_now,
)

if TYPE_CHECKING:
    from sailyard.artifacts import Artifact as Stored

HEARTBEAT_SECONDS = 5.0
"""How often a live stage touches its row."""

LOST_AFTER = timedelta(minutes=2)
"""A running stage of another machine that was silent for so long is taken for killed."""

LOST_AFTER_HERE = timedelta(minutes=30)
"""On this machine its process is looked for instead; a process id may be reused, though."""

_ERROR_CHARS = 20_000


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a metric series."""

    name: str
    step: int
    value: float
    at: datetime = field(default_factory=utc_now)


@dataclass(frozen=True, slots=True)
class ArtifactInfo:
    """What lineage keeps about an artifact."""

    digest: str
    kind: str
    size: int
    num_files: int
    meta: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, artifact: Stored) -> ArtifactInfo:
        """Of an artifact of the store."""
        return cls(
            digest=artifact.digest,
            kind=artifact.kind,
            size=artifact.size,
            num_files=len(artifact.files),
            meta=dict(artifact.meta or {}),
        )


def add_run(
    database: Database,
    run_id: str,
    *,
    recipe_name: str,
    recipe: Mapping[str, Any],
    overrides: Sequence[str],
    start_from: str,
    force: bool,
    num_stages: int,
    created_at: datetime,
) -> None:
    """Enter a run; a run that is there already stays as it is."""
    with database.write() as session:
        if session.get(Run, run_id) is None:
            session.add(
                Run(
                    id=run_id,
                    recipe_name=recipe_name,
                    recipe=dict(recipe),
                    overrides=list(overrides),
                    start_from=start_from,
                    force=force,
                    num_stages=num_stages,
                    created_at=created_at,
                )
            )
            add_event_to(session, "run created", run_id)


def start_stage(
    database: Database,
    run_id: str,
    stage: str,
    cache_key: str,
    inputs: Mapping[str, str],
    *,
    resumes: bool,
) -> int:
    """Enter that this process now runs the stage; returns the stage run's id.

    Args:
        database: The lineage database.
        run_id: A run that was added.
        stage: Name of the stage.
        cache_key: Of the result being made.
        inputs: Input name -> digest.
        resumes: A checkpoint exists, so the metric series so far stay; otherwise they are
            dropped, or a shorter second attempt would end in the first one's points.
    """
    with database.write() as session:
        row = _stage_row(session, run_id, stage)
        if row is None:
            row = _new_stage_row(run_id, stage)
            session.add(row)
        else:
            if row.status == "running":
                _lose(session, row)
            row.attempt += 1
        now = utc_now()
        row.status, row.cached, row.cache_key = "running", False, cache_key
        row.host, row.pid = socket.gethostname(), os.getpid()
        row.started_at, row.heartbeat_at, row.finished_at = now, now, None
        row.seconds = row.computed_seconds = 0.0
        row.progress_done, row.progress_total, row.progress_note = 0, 0, ""
        row.error, row.source_run_id, row.summary = "", run_id, {}
        session.flush()
        if not resumes:
            session.execute(delete(Metric).where(Metric.stage_run_id == row.id))
        _replace_links(session, StageInput, row.id, inputs)
        _replace_links(session, StageOutput, row.id, {})
        verb = "resumed" if resumes else "started"
        add_event_to(session, f"stage {verb}", run_id, stage, {"attempt": row.attempt})
        return row.id


def beat(
    database: Database,
    stage_run_id: int,
    points: Iterable[Point] = (),
    progress: tuple[int, int, str] | None = None,
) -> None:
    """A sign of life, with the metric points and the progress since the last one."""
    # A step written twice within a batch would make PostgreSQL refuse the batch.
    latest = {(point.name, point.step): point for point in points}
    rows = [
        {
            "stage_run_id": stage_run_id,
            "name": _text(point.name, 120),
            "step": point.step,
            "value": point.value if abs(point.value) < float("inf") else None,
            "at": point.at,
        }
        for point in latest.values()
    ]
    with database.write() as session:
        if rows:
            _upsert(session, Metric, rows, ["value", "at"])
        # Silent for a while and taken for lost, it is running after all.
        values: dict[str, Any] = {"heartbeat_at": utc_now(), "status": "running"}
        if progress is not None:
            done, total, note = progress
            values |= {"progress_done": done, "progress_total": total}
            values["progress_note"] = _text(note, 200)
        own = (
            StageRun.id == stage_run_id,
            StageRun.host == socket.gethostname(),
            StageRun.pid == os.getpid(),
        )
        session.execute(update(StageRun).where(*own).values(values))


def finish_stage(
    database: Database,
    stage_run_id: int,
    status: str,
    *,
    seconds: float,
    summary: Mapping[str, Any],
    error: str = "",
    outputs: Mapping[str, ArtifactInfo] | None = None,
) -> None:
    """Enter how the stage ended: finished, failed or stopped."""
    outputs = outputs or {}
    with database.write() as session:
        row = session.get_one(StageRun, stage_run_id, with_for_update=True)
        if (row.host, row.pid) != (socket.gethostname(), os.getpid()):
            # Taken for lost and started again elsewhere: the row is the other attempt's now.
            add_event_to(session, "stage superseded", row.run_id, row.stage, {"as": status})
            return
        row.status, row.error = status, _text(error, _ERROR_CHARS)
        row.seconds = row.computed_seconds = seconds
        row.finished_at = row.heartbeat_at = utc_now()
        row.summary = dict(summary)
        _add_artifacts(session, outputs.values())
        digests = {name: info.digest for name, info in outputs.items()}
        _replace_links(session, StageOutput, stage_run_id, digests)
        detail: dict[str, Any] = {"attempt": row.attempt, "seconds": round(seconds, 3)}
        if error:
            detail["error"] = _text(error, 500)
        add_event_to(session, f"stage {status}", row.run_id, row.stage, detail)


def record_cached(
    database: Database,
    run_id: str,
    stage: str,
    cache_key: str,
    inputs: Mapping[str, str],
    outputs: Mapping[str, ArtifactInfo],
    *,
    source_run_id: str,
    computed_seconds: float,
    summary: Mapping[str, Any],
) -> None:
    """Enter that the run has a finished result it need not make. Again changes nothing.

    A result this very run made, whose process was killed before it could say so, is entered
    as the run's own work.
    """
    with database.write() as session:
        row = _stage_row(session, run_id, stage)
        if row is None:
            row = _new_stage_row(run_id, stage)
            session.add(row)
        elif row.status == "finished" and row.cache_key == cache_key:
            return
        elif row.status == "running":
            _lose(session, row)
        own = source_run_id == run_id
        row.status, row.cached, row.cache_key = "finished", not own, cache_key
        row.heartbeat_at = row.finished_at = utc_now()
        row.seconds, row.computed_seconds = computed_seconds if own else 0.0, computed_seconds
        row.error, row.source_run_id, row.summary = "", source_run_id, dict(summary)
        session.flush()
        _replace_links(session, StageInput, row.id, inputs)
        _add_artifacts(session, outputs.values())
        digests = {name: info.digest for name, info in outputs.items()}
        _replace_links(session, StageOutput, row.id, digests)
        add_event_to(session, "stage cached", run_id, stage, {"source_run": source_run_id})


def mark_lost(database: Database) -> list[tuple[str, str]]:
    """Mark stages that say "running" though their process is gone; returns (run, stage) pairs."""
    with database.read() as session:
        running = session.scalars(select(StageRun).where(StageRun.status == "running")).all()
    suspects = [row.id for row in running if _is_gone(row)]
    if not suspects:
        return []
    marked = []
    with database.write() as session:
        query = select(StageRun).where(StageRun.id.in_(suspects)).with_for_update()
        for row in session.scalars(query):
            if row.status == "running" and _is_gone(row):
                _lose(session, row)
                marked.append((row.run_id, row.stage))
    return marked


def add_event(
    database: Database,
    kind: str,
    run_id: str = "",
    stage: str = "",
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Enter that something happened."""
    with database.write() as session:
        add_event_to(session, kind, run_id, stage, detail)


def add_event_to(
    session: Session,
    kind: str,
    run_id: str = "",
    stage: str = "",
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Enter an event as part of a transaction that is under way."""
    row = Event(at=utc_now(), run_id=run_id, stage=stage, kind=kind, detail=dict(detail or {}))
    session.add(row)


def _is_gone(row: StageRun) -> bool:
    silent = utc_now() - row.heartbeat_at
    if row.host != socket.gethostname():
        return silent > LOST_AFTER
    if silent > LOST_AFTER_HERE:
        return True
    try:
        os.kill(row.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _lose(session: Session, row: StageRun) -> None:
    row.status, row.finished_at = "lost", utc_now()
    row.error = "the process is gone without a word: killed, or out of memory"
    add_event_to(session, "stage lost", row.run_id, row.stage, {"attempt": row.attempt})


def _stage_row(session: Session, run_id: str, stage: str) -> StageRun | None:
    query = select(StageRun).where(StageRun.run_id == run_id, StageRun.stage == stage)
    return session.scalars(query.with_for_update()).one_or_none()


def _new_stage_row(run_id: str, stage: str) -> StageRun:
    now = utc_now()
    return StageRun(
        run_id=run_id,
        stage=stage,
        status="running",
        cache_key="",
        attempt=1,
        started_at=now,
        heartbeat_at=now,
        summary={},
    )


def _replace_links(
    session: Session,
    table: type[StageInput] | type[StageOutput],
    stage_run_id: int,
    digests: Mapping[str, str],
) -> None:
    session.execute(delete(table).where(table.stage_run_id == stage_run_id))
    session.add_all(
        table(stage_run_id=stage_run_id, name=name, digest=digest)
        for name, digest in digests.items()
    )


def _add_artifacts(session: Session, artifacts: Iterable[ArtifactInfo]) -> None:
    rows = {
        info.digest: {
            "digest": info.digest,
            "kind": _text(info.kind, 120),
            "size": info.size,
            "num_files": info.num_files,
            "meta": dict(info.meta),
            "created_at": utc_now(),
        }
        for info in artifacts
    }
    if rows:
        _upsert(session, Artifact, list(rows.values()), [])


def _upsert(
    session: Session, table: type[Base], rows: Sequence[Mapping[str, Any]], replace: Sequence[str]
) -> None:
    """Insert rows; on an existing key, replace the named columns, or nothing."""
    dialect = session.get_bind().dialect.name
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    statement = insert(table)
    keys = [column.name for column in table.__table__.primary_key]
    if replace:
        changes = {name: statement.excluded[name] for name in replace}
        statement = statement.on_conflict_do_update(index_elements=keys, set_=changes)
    else:
        statement = statement.on_conflict_do_nothing(index_elements=keys)
    # One statement and many rows: a statement that spelt the rows out would be compiled anew
    # for every batch size.
    session.connection().execute(statement, [dict(row) for row in rows])


def _text(value: str, limit: int) -> str:
    """Text a database column can hold: PostgreSQL refuses NUL, and columns are bounded."""
    value = value.replace("\x00", "")
    return value if len(value) <= limit else value[: limit - 1] + "…"
