"""The model registry: versions, the aliases that point at them, and every move of an alias."""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from sailyard.lineage import records
from sailyard.lineage.database import Database
from sailyard.lineage.schema import Alias, Promotion, utc_now
from sailyard.lineage.schema import ModelVersion as VersionRow

_ALIAS = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")


class RegistryError(ValueError):
    """A version or alias that is not there, or a move that makes no sense."""


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """A registered checkpoint.

    Attributes:
        name: Of the model, from the recipe.
        number: Counts up from 1 per name.
        checkpoint: Digest of the checkpoint artifact.
        report: Digest of the evaluation report artifact, or "".
        run_id: Run that registered it.
        metrics: Figures from the report, flat: name -> number.
        created_at: When it was registered.
        aliases: Aliases that point at it now.
    """

    id: int
    name: str
    number: int
    checkpoint: str
    report: str
    run_id: str
    metrics: dict[str, Any]
    created_at: datetime
    aliases: tuple[str, ...]

    @property
    def ref(self) -> str:
        """How people write it: "tiny:3"."""
        return f"{self.name}:{self.number}"


@dataclass(frozen=True, slots=True)
class PromotionInfo:
    """One move of an alias."""

    id: int
    alias: str
    action: str
    """promote | rollback"""
    version: str
    """ "name:number" it points at since """
    previous: str
    """ "name:number" it pointed at before, or "" """
    actor: str
    reason: str
    at: datetime


class Registry:
    """Model versions in a lineage database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def register(
        self,
        name: str,
        checkpoint: str,
        *,
        report: str = "",
        run_id: str = "",
        metrics: Mapping[str, Any] | None = None,
    ) -> ModelVersion:
        """Enter a checkpoint as the next version of a model.

        The same checkpoint under the same name is the same version: only its report and
        metrics are brought up to date.
        """
        with self._database.write() as session:
            _one_at_a_time(session)
            query = select(VersionRow).where(
                VersionRow.name == name, VersionRow.checkpoint == checkpoint
            )
            row = session.scalars(query).one_or_none()
            if row is None:
                newest = select(func.max(VersionRow.number)).where(VersionRow.name == name)
                row = VersionRow(
                    name=name,
                    number=(session.scalar(newest) or 0) + 1,
                    checkpoint=checkpoint,
                    run_id=run_id,
                    created_at=utc_now(),
                )
                session.add(row)
            row.report, row.metrics = report, dict(metrics or {})
            session.flush()
            return _infos(session, [row])[0]

    def versions(self, name: str = "", limit: int = 100) -> list[ModelVersion]:
        """The newest versions, of one model or of all, newest first."""
        with self._database.read() as session:
            query = select(VersionRow).order_by(VersionRow.id.desc()).limit(limit)
            if name:
                query = query.where(VersionRow.name == name)
            return _infos(session, session.scalars(query).all())

    def version(self, ref: str) -> ModelVersion:
        """A version by "name:number", by "name" (its newest), by alias, or by digest prefix.

        Raises:
            RegistryError: Nothing fits.
        """
        with self._database.read() as session:
            row = _find(session, ref)
            return _infos(session, [row])[0]

    def find(self, name: str, checkpoint: str) -> ModelVersion | None:
        """The version that is this checkpoint under this name, or None."""
        with self._database.read() as session:
            query = select(VersionRow).where(
                VersionRow.name == name, VersionRow.checkpoint == checkpoint
            )
            rows = session.scalars(query).all()
            return _infos(session, rows)[0] if rows else None

    def current(self, alias: str) -> ModelVersion | None:
        """The version the alias points at, or None."""
        with self._database.read() as session:
            row = session.get(Alias, alias)
            if row is None:
                return None
            return _infos(session, [session.get_one(VersionRow, row.version_id)])[0]

    def aliases(self) -> dict[str, ModelVersion]:
        """Alias -> the version it points at."""
        with self._database.read() as session:
            rows = session.scalars(select(Alias).order_by(Alias.alias)).all()
            versions = [session.get_one(VersionRow, row.version_id) for row in rows]
            return dict(zip([row.alias for row in rows], _infos(session, versions), strict=True))

    def promote(
        self, alias: str, ref: str, *, actor: str = "", reason: str = "", run_id: str = ""
    ) -> ModelVersion:
        """Point the alias at a version. It points there already: nothing happens.

        Raises:
            RegistryError: The alias is not a plain word, or no version fits.
        """
        if not _ALIAS.fullmatch(alias):
            raise RegistryError(
                f"{alias!r} cannot be an alias; use small letters, digits, dots and dashes"
            )
        with self._database.write() as session:
            _one_at_a_time(session)
            target = _find(session, ref)
            row = session.get(Alias, alias)
            if row is None or row.version_id != target.id:
                self._move(session, alias, row, target.id, "promote", actor, reason, run_id)
            session.flush()
            return _infos(session, [target])[0]

    def rollback(
        self, alias: str, *, actor: str = "", reason: str = "", only_from: str = ""
    ) -> ModelVersion:
        """Point the alias at what it pointed at before; again goes further back.

        Args:
            alias: That moves.
            actor: Who moves it; by default this process's user.
            reason: Kept with the move.
            only_from: Digest of a checkpoint; an alias that has left it meanwhile stays.

        Raises:
            RegistryError: There is nothing before, or the alias is elsewhere.
        """
        with self._database.write() as session:
            _one_at_a_time(session)
            row = session.get(Alias, alias)
            if row is None:
                raise RegistryError(f"nothing was ever promoted to {alias!r}")
            if only_from and session.get_one(VersionRow, row.version_id).checkpoint != only_from:
                raise RegistryError(f"{alias!r} points elsewhere by now")
            history = _standing(session, alias)
            if len(history) < 2:
                raise RegistryError(
                    f"{alias!r} has had one version only; promote another one instead"
                )
            self._move(session, alias, row, history[-2], "rollback", actor, reason, "")
            session.flush()
            return _infos(session, [session.get_one(VersionRow, history[-2])])[0]

    def promotions(self, alias: str = "", limit: int = 100) -> list[PromotionInfo]:
        """The newest moves, of one alias or of all, newest first."""
        with self._database.read() as session:
            query = select(Promotion).order_by(Promotion.id.desc()).limit(limit)
            if alias:
                query = query.where(Promotion.alias == alias)
            moves = session.scalars(query).all()
            refs = {
                row.id: f"{row.name}:{row.number}" for row in session.scalars(select(VersionRow))
            }
            return [
                PromotionInfo(
                    id=move.id,
                    alias=move.alias,
                    action=move.action,
                    version=refs[move.version_id],
                    previous=refs.get(move.previous_version_id or 0, ""),
                    actor=move.actor,
                    reason=move.reason,
                    at=move.at,
                )
                for move in moves
            ]

    def was_promoted(self, alias: str, checkpoint: str) -> bool:
        """Whether the alias ever pointed at a version with that checkpoint."""
        with self._database.read() as session:
            query = (
                select(Promotion.id)
                .join(VersionRow, VersionRow.id == Promotion.version_id)
                .where(Promotion.alias == alias, VersionRow.checkpoint == checkpoint)
            )
            return session.scalars(query.limit(1)).first() is not None

    def _move(
        self,
        session: Session,
        alias: str,
        row: Alias | None,
        version_id: int,
        action: str,
        actor: str,
        reason: str,
        run_id: str,
    ) -> None:
        now = utc_now()
        previous = row.version_id if row else None
        if row is None:
            session.add(Alias(alias=alias, version_id=version_id, updated_at=now))
        else:
            row.version_id, row.updated_at = version_id, now
        session.add(
            Promotion(
                alias=alias,
                action=action,
                version_id=version_id,
                previous_version_id=previous,
                actor=actor or _who(),
                reason=reason,
                at=now,
            )
        )
        version = session.get_one(VersionRow, version_id)
        detail = {"alias": alias, "version": f"{version.name}:{version.number}"}
        records.add_event_to(session, f"model {action}", run_id, "", detail)


def _one_at_a_time(session: Session) -> None:
    """Let registry writers queue. SQLite's writers do anyway; on PostgreSQL two of them could
    both take the next number, or both move an alias from the same place."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("LOCK TABLE model_versions, aliases IN SHARE ROW EXCLUSIVE MODE"))


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"uid {os.getuid()}"


def _find(session: Session, ref: str) -> VersionRow:
    query = select(VersionRow)
    name, colon, number = ref.rpartition(":")
    if colon and number.isdigit():
        found = query.where(VersionRow.name == name, VersionRow.number == int(number))
    else:
        alias = session.get(Alias, ref)
        if alias is not None:
            return session.get_one(VersionRow, alias.version_id)
        named = query.where(VersionRow.name == ref).order_by(VersionRow.number.desc())
        newest = session.scalars(named.limit(1)).one_or_none()
        if newest is not None:
            return newest
        found = query.where(VersionRow.checkpoint.startswith(ref, autoescape=True))
    rows = session.scalars(found.limit(2)).all() if ref else []
    if len(rows) == 1:
        return rows[0]
    several = "several model versions fit" if rows else "there is no model version"
    raise RegistryError(f"{several} {ref!r}; `sailyard status --models` lists them")


def _standing(session: Session, alias: str) -> list[int]:
    """Versions the alias stood on, oldest first, with rolled-back ones taken off."""
    stack: list[int] = []
    query = select(Promotion).where(Promotion.alias == alias).order_by(Promotion.id)
    for move in session.scalars(query):
        if move.action == "rollback":
            stack.pop()
        else:
            stack.append(move.version_id)
    return stack


def _infos(session: Session, rows: Iterable[VersionRow]) -> list[ModelVersion]:
    pointing: dict[int, list[str]] = {}
    for alias in session.scalars(select(Alias).order_by(Alias.alias)):
        pointing.setdefault(alias.version_id, []).append(alias.alias)
    return [
        ModelVersion(
            id=row.id,
            name=row.name,
            number=row.number,
            checkpoint=row.checkpoint,
            report=row.report,
            run_id=row.run_id,
            metrics=dict(row.metrics),
            created_at=row.created_at,
            aliases=tuple(pointing.get(row.id, ())),
        )
        for row in rows
    ]
