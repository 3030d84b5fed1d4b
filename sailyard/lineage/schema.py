"""Tables of the lineage database. A change here needs a migration beside it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Float,
    ForeignKey,
    Index,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

HEAD = "0001"
"""Newest migration; a test holds it against the scripts."""


class UtcDateTime(TypeDecorator[datetime]):
    """Aware datetimes in UTC. SQLite forgets the zone, so it is put back on the way out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To UTC; a naive datetime is a mistake."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value!r} has no time zone; use sailyard.lineage.utc_now()")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """As UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def utc_now() -> datetime:
    """The present moment, aware."""
    return datetime.now(UTC)


class Base(DeclarativeBase):
    """Root of the tables."""


class Run(Base):
    """One execution of the pipeline."""

    __tablename__ = "runs"

    id: Mapped[str] = mapped_column(String(80), primary_key=True)
    recipe_name: Mapped[str] = mapped_column(String(80))
    recipe: Mapped[dict[str, Any]] = mapped_column(JSON)
    overrides: Mapped[list[str]] = mapped_column(JSON)
    start_from: Mapped[str] = mapped_column(String(80), default="")
    force: Mapped[bool] = mapped_column(default=False)
    num_stages: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)


class StageRun(Base):
    """One stage of one run. Attempts after a kill or a stop go on in the same row."""

    __tablename__ = "stage_runs"
    __table_args__ = (UniqueConstraint("run_id", "stage"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"))
    stage: Mapped[str] = mapped_column(String(80))
    status: Mapped[str] = mapped_column(String(16))
    """running | finished | failed | stopped (asked to, will resume) | lost (killed)"""
    cached: Mapped[bool] = mapped_column(default=False)
    cache_key: Mapped[str] = mapped_column(String(64), index=True)
    attempt: Mapped[int] = mapped_column(default=1)
    host: Mapped[str] = mapped_column(String(255), default="")
    pid: Mapped[int] = mapped_column(default=0)
    started_at: Mapped[datetime] = mapped_column(UtcDateTime)
    heartbeat_at: Mapped[datetime] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    seconds: Mapped[float] = mapped_column(Float, default=0.0)
    """Wall seconds of this attempt in this run; next to none when cached."""
    computed_seconds: Mapped[float] = mapped_column(Float, default=0.0)
    """Wall seconds of the attempt that made the result, in whichever run that was."""
    progress_done: Mapped[int] = mapped_column(BigInteger, default=0)
    progress_total: Mapped[int] = mapped_column(BigInteger, default=0)
    progress_note: Mapped[str] = mapped_column(String(200), default="")
    error: Mapped[str] = mapped_column(Text, default="")
    source_run_id: Mapped[str] = mapped_column(String(80), default="")
    """Run that made the result; its stage run owns the metric series."""
    summary: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)


class Artifact(Base):
    """An immutable artifact that some stage read or made."""

    __tablename__ = "artifacts"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    kind: Mapped[str] = mapped_column(String(120), index=True)
    size: Mapped[int] = mapped_column(BigInteger)
    num_files: Mapped[int]
    meta: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class StageInput(Base):
    """An artifact a stage run read, under the stage's name for it."""

    __tablename__ = "stage_inputs"

    stage_run_id: Mapped[int] = mapped_column(ForeignKey("stage_runs.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(80), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), index=True)


class StageOutput(Base):
    """An artifact a stage run made or reused, under the stage's name for it."""

    __tablename__ = "stage_outputs"

    stage_run_id: Mapped[int] = mapped_column(ForeignKey("stage_runs.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(80), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), index=True)


class Metric(Base):
    """One point of a series; the key makes a replayed step replace itself."""

    __tablename__ = "metrics"

    stage_run_id: Mapped[int] = mapped_column(ForeignKey("stage_runs.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(120), primary_key=True)
    step: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    value: Mapped[float | None] = mapped_column(Float)
    """None: it was NaN or infinite."""
    at: Mapped[datetime] = mapped_column(UtcDateTime)


class ModelVersion(Base):
    """A registered checkpoint; numbers count up per name."""

    __tablename__ = "model_versions"
    __table_args__ = (
        UniqueConstraint("name", "number"),
        UniqueConstraint("name", "checkpoint"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(80))
    number: Mapped[int]
    checkpoint: Mapped[str] = mapped_column(String(64), index=True)
    report: Mapped[str] = mapped_column(String(64), default="")
    run_id: Mapped[str] = mapped_column(String(80), default="")
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class Alias(Base):
    """A name that points at exactly one version, such as "production"."""

    __tablename__ = "aliases"

    alias: Mapped[str] = mapped_column(String(80), primary_key=True)
    version_id: Mapped[int] = mapped_column(ForeignKey("model_versions.id"))
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime)


class Promotion(Base):
    """One move of an alias, forward or back; never changed afterwards."""

    __tablename__ = "promotions"
    __table_args__ = (Index("ix_promotions_alias_id", "alias", "id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    alias: Mapped[str] = mapped_column(String(80))
    action: Mapped[str] = mapped_column(String(16))
    """promote | rollback"""
    version_id: Mapped[int] = mapped_column(ForeignKey("model_versions.id"))
    previous_version_id: Mapped[int | None] = mapped_column(ForeignKey("model_versions.id"))
    actor: Mapped[str] = mapped_column(String(120))
    reason: Mapped[str] = mapped_column(Text, default="")
    at: Mapped[datetime] = mapped_column(UtcDateTime)


class Event(Base):
    """Something that happened, for people to read later."""

    __tablename__ = "events"
    __table_args__ = (Index("ix_events_run_id_id", "run_id", "id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    run_id: Mapped[str] = mapped_column(String(80), default="")
    stage: Mapped[str] = mapped_column(String(80), default="")
    kind: Mapped[str] = mapped_column(String(40))
    detail: Mapped[dict[str, Any]] = mapped_column(JSON)
