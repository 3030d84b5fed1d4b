"""Connections to the lineage database: SQLite by default, PostgreSQL in a cluster."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, OperationalError
from sqlalchemy.orm import Session

from sailyard.lineage.schema import HEAD

if TYPE_CHECKING:
    from sailyard.settings import Settings

# A batch takes milliseconds, but a busy machine may leave its writer without a processor for a
# minute in the middle of it. What waits longer waits for a stuck process.
BUSY_SECONDS = 120

# Any constant will do, as long as every process asks PostgreSQL for the same lock.
_MIGRATION_LOCK = 0x5A11


class DatabaseError(ValueError):
    """The lineage database cannot be used; the message says which, and the way out."""


class Database:
    """One lineage database, safe to use from several threads and processes.

    The schema is brought up to date at first use. Reads and writes take separate doors:
    SQLite wants to know at the start of a transaction that it will write, or two processes
    that both read first and write later cannot both go on.
    """

    def __init__(self, url: str) -> None:
        """Remember the URL; nothing is opened yet.

        Raises:
            DatabaseError: The URL is not one of SQLite or PostgreSQL.
        """
        self._url = _parse_url(url)
        self._engine: Engine | None = None
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The URL without its password."""
        return self._url.render_as_string(hide_password=True)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session to read with; one consistent snapshot."""
        with Session(self._ready(), expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session that commits when the block ends, and rolls back if it raises."""
        engine = self._ready().execution_options(sailyard_write=True)
        with Session(engine, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        """Close every connection; the next use opens again."""
        with self._lock:
            if self._engine is not None:
                self._engine.dispose()
                self._engine = None

    def _ready(self) -> Engine:
        with self._lock:
            if self._engine is None:
                engine = _make_engine(self._url)
                try:
                    _bring_up_to_date(engine)
                except OperationalError as error:
                    engine.dispose()
                    raise DatabaseError(
                        f"cannot open the lineage database {self.name}: {_reason(error)}. "
                        "Check that it runs and that SAILYARD_DATABASE_URL is right."
                    ) from None
                self._engine = engine
            return self._engine


def open_database(settings: Settings) -> Database:
    """The database the settings name."""
    return Database(settings.database_url)


def _parse_url(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        # The text may hold a password, so it is not repeated.
        raise DatabaseError(
            "SAILYARD_DATABASE_URL is not a database URL; write sqlite:///path or "
            "postgresql://user:password@host/name"
        ) from None
    backend = parsed.get_backend_name()
    if backend in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if backend == "sqlite" and parsed.database and parsed.database != ":memory:":
        return parsed
    raise DatabaseError(
        f"lineage is kept in a SQLite file or in PostgreSQL, not in "
        f"{parsed.render_as_string(hide_password=True)!r}"
    )


def _make_engine(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True, pool_size=2, max_overflow=6)
    Path(url.database or "").parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS})
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # Python's driver would open transactions by itself; _begin_sqlite does it instead.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("sailyard_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _bring_up_to_date(engine: Engine) -> None:
    """Run the migrations that are missing. Several processes may try at once: one does it."""
    if _revision(engine) == HEAD:
        return
    # Imported here: it is only needed once in the life of a database.
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.execution_options(sailyard_write=True).begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise DatabaseError(
                f"the lineage database {engine.url.render_as_string(hide_password=True)} does not "
                f"fit this version of Sailyard ({error}); upgrade Sailyard or name another database"
            ) from None


def _revision(engine: Engine) -> str | None:
    with engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        revision: str | None = connection.execute(
            text("SELECT version_num FROM alembic_version")
        ).scalar()
        return revision


def _reason(error: OperationalError) -> str:
    """The driver's first line, without SQL and parameters."""
    lines = str(error.orig).strip().splitlines()
    return lines[0] if lines else type(error.orig).__name__
