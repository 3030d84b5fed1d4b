"""The stage contract: caching, resuming, ending well and badly, and what is written down."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import update

from sailyard.artifacts import LocalStore
from sailyard.lineage import queries, records
from sailyard.lineage.schema import StageRun
from sailyard.pipeline import Pipeline
from sailyard.recipe import load_recipe
from sailyard.runs import RunError, results_of, reuse, stage_result
from sailyard.settings import get_settings
from sailyard.stage import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_RESUME,
    Checkpoints,
    MemoryRecorder,
    StageError,
    cache_key,
    local_context,
    stage_seed,
)
from sailyard.stage.context import jsonable
from sailyard.stage.results import global_key
from sailyard.stage.runner import execute
from sailyard.yard import Yard
from tests.sailyard import stages
from tests.sailyard.stages import DRAW, NUM_STEPS, TRAIN, lone, open_run, read_output


@pytest.fixture
def yard() -> Iterator[Yard]:
    found = Yard()
    yield found
    found.database.close()


def draw_and_train(yard: Yard, run_id: str = "run-1") -> str:
    """Digest of the trained weights."""
    run = open_run(yard, run_id)
    assert execute(yard, run, DRAW) == EXIT_OK
    assert execute(yard, run, TRAIN) == EXIT_OK
    result = stage_result(run_id, TRAIN.name, yard)
    assert result is not None
    return result.outputs["weights"]


# --- the cache key -------------------------------------------------------------------------------


def test_cache_key_changes_with_what_the_stage_depends_on_and_with_nothing_else() -> None:
    recipe = load_recipe("micro")
    inputs = {"numbers": "a" * 64}
    key = cache_key(TRAIN, recipe, inputs)
    same = load_recipe("micro", ["world.num_images=7", "alignment.fine_grained.lr=3.3e-3"])
    assert cache_key(TRAIN, same, inputs) == key
    for other in ("alignment.warmup.lr=3.3e-3", "seed=5"):
        assert cache_key(TRAIN, load_recipe("micro", [other]), inputs) != key
    assert cache_key(TRAIN, recipe, {"numbers": "b" * 64}) != key


def test_cache_key_ignores_the_recipe_name() -> None:
    inputs = {"numbers": "a" * 64}
    named = load_recipe("micro", ["name=other"])
    assert cache_key(TRAIN, named, inputs) == cache_key(TRAIN, load_recipe("micro"), inputs)


def test_seeds_differ_between_stages_and_never_change() -> None:
    assert stage_seed(0, "alignment.warmup") == 1810208530
    assert stage_seed(0, "alignment.warmup") != stage_seed(0, "alignment.fine_grained")
    assert 0 <= stage_seed(2**63 - 1, "x") < 2**31


# --- the context ---------------------------------------------------------------------------------


def test_an_undeclared_section_is_refused_by_name(tmp_path: Path) -> None:
    ctx = local_context(tmp_path, load_recipe("micro"), "alignment.warmup", {})
    assert ctx.section("alignment.warmup").lr > 0
    assert ctx.section("alignment.warmup.lr") == ctx.section("alignment.warmup").lr
    assert ctx.section("seed") == 0
    with pytest.raises(StageError, match=r"did not declare .*'alignment\.fine_grained'"):
        ctx.section("alignment.fine_grained")
    with pytest.raises(StageError, match="did not declare"):
        ctx.section("alignment")


def test_unknown_inputs_and_outputs_are_refused_by_name(tmp_path: Path) -> None:
    recipe = load_recipe("micro")
    ctx = local_context(tmp_path, recipe, "alignment.warmup", {"mix": tmp_path})
    assert ctx.input("mix") == tmp_path
    with pytest.raises(StageError, match="no input 'mixture'; it has vision, language, mix"):
        ctx.input("mixture")
    with pytest.raises(StageError, match=r"input 'vision' .* was not given"):
        ctx.input("vision")
    with pytest.raises(StageError, match="no output 'model'; it has checkpoint"):
        ctx.output("model")
    with pytest.raises(StageError, match="no input 'x'"):
        local_context(tmp_path, recipe, "alignment.warmup", {"x": tmp_path})


def test_local_context_runs_an_entry_without_a_run(tmp_path: Path) -> None:
    ctx = local_context(tmp_path, load_recipe("micro"), "curation.text", {})
    ctx.metric(3, loss=0.5)
    ctx.metric(4, loss=0.25, lr=1.0)
    ctx.progress(1, 2, "half")
    ctx.summary(rows=3)
    ctx.summary(rows=4, nested={"a": [1, float("nan")]})
    assert isinstance(ctx.recorder, MemoryRecorder)
    assert ctx.recorder.series("loss") == [(3, 0.5), (4, 0.25)]
    assert ctx.recorder.progress_calls == [(1, 2, "half")]
    assert ctx.summary_values == {"rows": 4, "nested": {"a": [1, None]}}
    assert list(ctx.output("text").iterdir()) == []
    assert ctx.registry.versions() == []


def test_a_summary_that_json_cannot_hold_names_the_place() -> None:
    with pytest.raises(StageError, match=r"judges\.vir\[1\] is a Path|PosixPath"):
        jsonable({"vir": [1, Path("x")]}, "judges")


# --- running -------------------------------------------------------------------------------------


def test_a_stage_is_run_published_and_written_down(yard: Yard) -> None:
    digest = draw_and_train(yard)
    weights = read_output(yard, digest, "weights.txt")
    assert len(weights) == 64
    drawn = stage_result("run-1", DRAW.name, yard)
    assert drawn is not None
    artifact = yard.artifacts.get(drawn.outputs["numbers"])
    assert (artifact.kind, artifact.meta) == ("curation.draw/numbers", {"count": 120})
    row = queries.stage_run(yard.database, "run-1", TRAIN.name)
    assert row is not None
    assert (row.status, row.cached, row.attempt) == ("finished", False, 1)
    assert row.inputs == {"numbers": drawn.outputs["numbers"]}
    assert row.outputs == {"weights": digest}
    assert row.summary == {"loss_first": 1.0, "loss_last": 1 / NUM_STEPS}
    assert (row.progress_done, row.progress_total, row.progress_note) == (40, 40, "hashing")
    series = queries.metric_series(yard.database, "run-1", TRAIN.name)
    assert [step for step, _ in series["loss"]] == list(range(1, NUM_STEPS + 1))
    assert queries.get_run(yard.database, "run-1").status == "finished"
    assert yard.store.list("checkpoints/") == []
    assert list((get_settings().home / "work").iterdir()) == []


def test_a_second_run_reuses_both_stages_and_shows_the_same_series(yard: Yard) -> None:
    digest = draw_and_train(yard)
    assert draw_and_train(yard, "run-2") == digest
    row = queries.stage_run(yard.database, "run-2", TRAIN.name)
    assert row is not None
    assert (row.cached, row.source_run_id, row.seconds) == (True, "run-1", 0.0)
    assert row.computed_seconds > 0.3
    series = queries.metric_series(yard.database, "run-2", TRAIN.name)
    assert series == queries.metric_series(yard.database, "run-1", TRAIN.name)
    copy = stage_result("run-2", TRAIN.name, yard)
    assert copy is not None
    assert copy.cached
    assert copy.run_id == "run-1"


def test_a_changed_field_runs_only_the_stages_that_read_it(yard: Yard) -> None:
    draw_and_train(yard)
    changed = load_recipe("micro", ["alignment.warmup.lr=1e-5"])
    run = open_run(yard, "run-2", recipe=changed)
    results = results_of(yard, run)
    assert reuse(yard, run, DRAW.name, results) is not None
    assert reuse(yard, run, TRAIN.name, results) is None


def test_force_runs_again_but_only_once_per_run(yard: Yard) -> None:
    draw_and_train(yard)
    run = open_run(yard, "run-2", force=True)
    assert results_of(yard, run).find(DRAW.name) is None
    assert execute(yard, run, DRAW) == EXIT_OK
    again = queries.stage_run(yard.database, "run-2", DRAW.name)
    assert again is not None
    assert not again.cached
    assert execute(yard, run, DRAW) == EXIT_OK
    after = queries.stage_run(yard.database, "run-2", DRAW.name)
    assert after is not None
    assert after.attempt == 1


def test_new_code_and_new_inputs_ask_for_a_new_result_within_the_same_run(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_and_train(yard)
    newer = replace(TRAIN, version=2)
    run = open_run(yard, pipeline=Pipeline([DRAW, newer]))
    assert results_of(yard, run).find(TRAIN.name) is None
    assert execute(yard, run, newer) == EXIT_OK
    assert results_of(yard, run).find(TRAIN.name) is not None
    monkeypatch.setattr(stages, "draw", stages.draw_otherwise)
    assert execute(yard, run, DRAW, force=True) == EXIT_OK
    assert results_of(yard, run).find(DRAW.name) is not None
    assert results_of(yard, run).find(TRAIN.name) is None


def test_a_run_that_starts_later_only_reuses_what_is_before(yard: Yard) -> None:
    run = open_run(yard, "run-1", start_from=TRAIN.name)
    assert run.started_stages() == {TRAIN.name}
    assert execute(yard, run, DRAW) == EXIT_FAILED
    with pytest.raises(RunError, match=r"'curation\.draw' before it has no finished result"):
        run.check_may_run(DRAW.name)
    draw_and_train(yard, "run-2")
    later = open_run(yard, "run-3", start_from=TRAIN.name, force=True)
    assert execute(yard, later, DRAW) == EXIT_OK
    assert execute(yard, later, TRAIN) == EXIT_OK
    rows = {row.stage: row.cached for row in queries.stage_runs(yard.database, "run-3")}
    assert rows == {DRAW.name: True, TRAIN.name: False}


def test_a_stage_whose_inputs_are_missing_says_which(
    yard: Yard, capfd: pytest.CaptureFixture[str]
) -> None:
    assert execute(yard, open_run(yard), TRAIN) == EXIT_FAILED
    output = capfd.readouterr().out
    assert "reads 'curation.draw/numbers'" in output
    assert "run that stage first" in output


def test_a_result_whose_artifact_was_deleted_is_not_reused(yard: Yard) -> None:
    draw_and_train(yard)
    drawn = stage_result("run-1", DRAW.name, yard)
    assert drawn is not None
    yard.store.delete(f"artifacts/{drawn.outputs['numbers']}/pointer.json")
    run = open_run(yard, "run-2")
    assert results_of(yard, run).find(DRAW.name) is None
    assert execute(yard, run, DRAW) == EXIT_OK


def test_a_failed_stage_says_why_everywhere_and_publishes_nothing(
    yard: Yard, capfd: pytest.CaptureFixture[str]
) -> None:
    stage = lone("fail")
    run = open_run(yard, pipeline=Pipeline([stage]))
    assert execute(yard, run, stage) == EXIT_FAILED
    assert "no image in row 3" in capfd.readouterr().out
    result = stage_result("run-1", stage.name, yard)
    assert result is not None
    assert (result.status, result.outputs) == ("failed", {})
    assert "ValueError: no image in row 3" in result.error
    row = queries.stage_run(yard.database, "run-1", stage.name)
    assert row is not None
    assert (row.status, row.error) == ("failed", result.error)
    assert yard.store.list("stages/") == []
    assert yard.store.list("artifacts/") == []
    assert queries.get_run(yard.database, "run-1").status == "failed"


def test_an_empty_output_is_a_failure(yard: Yard) -> None:
    stage = lone("leave_empty")
    assert execute(yard, open_run(yard, pipeline=Pipeline([stage])), stage) == EXIT_FAILED
    result = stage_result("run-1", stage.name, yard)
    assert result is not None
    assert "left its output 'weights' empty" in result.error


def row_of(yard: Yard, run_id: str, stage: str) -> str:
    row = queries.stage_run(yard.database, run_id, stage)
    assert row is not None
    return row.cache_key


def test_a_lost_store_in_mid_stage_publishes_nothing_and_a_second_try_goes_on(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(yard)
    assert execute(yard, run, DRAW) == EXIT_OK
    put, calls = LocalStore.put, 0

    def break_later(self: LocalStore, key: str, *args: object, **options: object) -> bool:
        nonlocal calls
        calls += key.startswith("checkpoints/")
        if calls > 5:
            raise OSError(28, "No space left on device")
        return put(self, key, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalStore, "put", break_later)
    assert execute(yard, run, TRAIN) == EXIT_FAILED
    row = queries.stage_run(yard.database, "run-1", TRAIN.name)
    assert row is not None
    assert row.status == "failed"
    assert "No space left on device" in row.error
    monkeypatch.undo()
    monkeypatch.setenv("SAILYARD_HOME", str(yard.settings.home))
    assert yard.store.list("stages/") == [global_key(row_of(yard, "run-1", DRAW.name))]
    assert execute(yard, run, TRAIN) == EXIT_OK
    events = [event.kind for event in queries.events(yard.database, "run-1")]
    assert "stage resumed" in events


def test_a_stop_request_saves_and_asks_to_be_resumed(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = draw_and_train(yard, "run-0")
    yard.store.delete(global_key(row_of(yard, "run-0", TRAIN.name)))
    run = open_run(yard)
    assert execute(yard, run, DRAW) == EXIT_OK
    monkeypatch.setenv("STOP_AT", "17")
    assert execute(yard, run, TRAIN) == EXIT_RESUME
    assert Checkpoints(yard.store, row_of(yard, "run-1", TRAIN.name), yard.folder("x")).exist()
    stopped = stage_result("run-1", TRAIN.name, yard)
    assert stopped is not None
    assert stopped.status == "stopped"
    assert execute(yard, run, TRAIN) == EXIT_OK
    result = stage_result("run-1", TRAIN.name, yard)
    assert result is not None
    assert result.outputs["weights"] == undisturbed
    row = queries.stage_run(yard.database, "run-1", TRAIN.name)
    assert row is not None
    assert row.attempt == 2


def test_a_stage_without_checkpoints_is_interrupted_at_once(yard: Yard) -> None:
    stage = lone("wait_for_ever")
    run = open_run(yard, pipeline=Pipeline([stage]))
    started = time.monotonic()
    assert execute(yard, run, stage) == EXIT_RESUME
    assert time.monotonic() - started < 300, "it would have slept for 600"


def test_a_result_made_but_not_noted_is_the_runs_own(yard: Yard) -> None:
    """As after a kill between the result under its key and everything that follows."""
    draw_and_train(yard)
    yard.store.delete(f"runs/run-1/stages/{TRAIN.name}/result.json")
    with yard.database.write() as session:
        session.execute(
            update(StageRun)
            .where(StageRun.stage == TRAIN.name)
            .values(status="running", pid=2**22 + 1, host=os.uname().nodename)
        )
    run = open_run(yard)
    assert execute(yard, run, TRAIN) == EXIT_OK
    row = queries.stage_run(yard.database, "run-1", TRAIN.name)
    assert row is not None
    assert (row.status, row.cached) == ("finished", False)


def test_a_running_row_without_its_process_is_marked_lost(yard: Yard) -> None:
    run = open_run(yard)
    assert execute(yard, run, DRAW) == EXIT_OK
    row_id = records.start_stage(yard.database, run.id, TRAIN.name, "k", {}, resumes=False)
    assert records.mark_lost(yard.database) == []
    with yard.database.write() as session:
        session.get_one(StageRun, row_id).pid = 2**22 + 1
    assert records.mark_lost(yard.database) == [(run.id, TRAIN.name)]
    row = queries.stage_run(yard.database, run.id, TRAIN.name)
    assert row is not None
    assert row.status == "lost"
