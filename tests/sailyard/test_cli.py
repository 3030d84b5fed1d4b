"""The command line: every listing as a table and as JSON, errors in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from sailyard.cli import commands
from sailyard.lineage import ArtifactInfo, records
from sailyard.recipe import RecipeError
from sailyard.registry import RegistryError
from sailyard.runs import RunError, create_run, load_run
from sailyard.yard import Yard

ROOT = Path(__file__).parents[2]
runner = CliRunner()


def call(*arguments: str, code: int = 0) -> str:
    result = runner.invoke(commands, list(arguments), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout


def call_json(*arguments: str, code: int = 0) -> Any:
    return json.loads(call(*arguments, "--json", code=code))


@pytest.fixture
def run_id() -> str:
    """A run of which one stage made an artifact out of another."""
    yard = Yard()
    run_id = create_run("micro", ["seed=3"], yard=yard)
    for stage, inputs, output in (
        ("curation.text", {}, "a"),
        ("bootstrap.language", {"text": "a" * 64}, "b"),
    ):
        row = records.start_stage(yard.database, run_id, stage, "k", inputs, resumes=False)
        made = ArtifactInfo(output * 64, f"{stage}/out", 2048, 1)
        records.finish_stage(
            yard.database, row, "finished", seconds=2.0, summary={"x": 1}, outputs={"out": made}
        )
    yard.registry.register("micro", "b" * 64, run_id=run_id, metrics={"overall.accuracy": 0.5})
    yard.registry.register("micro", "c" * 64, run_id=run_id)
    return run_id


def test_status_lists_runs_and_stages(run_id: str) -> None:
    runs = call_json("status")
    assert [(run["id"], run["num_finished"], run["status"]) for run in runs] == [
        (run_id, 2, "running")
    ]
    assert run_id in call("status").replace("\n", "")
    stages = call_json("status", run_id)
    assert len(stages) == 41
    by_name = {stage["stage"]: stage for stage in stages}
    assert by_name["curation.text"]["status"] == "finished"
    assert by_name["curation.text"]["info"]["outputs"] == {"out": "a" * 64}
    assert by_name["curation.ingest"]["status"] == "pending"
    assert "curation.text" in call("status", run_id)


def test_run_ids_sort_by_time_and_name_the_recipe(run_id: str) -> None:
    day, clock, recipe, chance = run_id.split("-")
    assert (len(day), len(clock), recipe, len(chance)) == (8, 4, "micro", 4)
    run = load_run(run_id)
    assert run.recipe.seed == 3
    assert run.overrides == ("seed=3",)


def test_models_are_listed_promoted_and_rolled_back(run_id: str) -> None:
    assert [m["ref"] for m in call_json("status", "--models")] == ["micro:2", "micro:1"]
    assert call_json("promote", "micro:1", "--reason", "good")["ref"] == "micro:1"
    assert "production -> micro:2" in call("promote", "micro:2")
    assert call_json("rollback")["ref"] == "micro:1"
    moves = call_json("status", "--promotions")
    assert [move["action"] for move in moves] == ["rollback", "promote", "promote"]
    assert moves[-1]["reason"] == "good"
    assert "micro:1" in call("status", "--models")
    assert "rollback" in call("status", "--promotions")
    kinds = [event["kind"] for event in call_json("status", "--events", "--limit", "3")]
    assert kinds == ["model rollback", "model promote", "model promote"]
    with pytest.raises(RegistryError, match="one version only"):
        call("rollback")


def test_lineage_follows_a_version_back_to_its_data(run_id: str) -> None:
    graph = call_json("lineage", "micro:1")
    assert graph["root"] == "b" * 64
    assert [edge["source"] for edge in graph["edges"]] == ["a" * 64]
    text = call("lineage", "bbbb")
    assert "made from: bootstrap.language/out bbbbbbbbbbbb" in text
    assert "curation.text/out aaaaaaaaaaaa (2.0 KiB)" in text
    assert "went into" in call("lineage", "aaaa", "--direction", "both")
    assert len(call_json("lineage")) == 2
    assert "aaaaaaaaaaaa" in call("lineage")


def test_report_is_one_object(run_id: str) -> None:
    assert call_json("report")["run"]["id"] == run_id
    assert call_json("report", run_id)["stages"][0]["name"] == "curation.ingest"
    assert "curation.text" in call("report")


def test_stage_list_needs_no_run() -> None:
    stages = call_json("stage", "list", "--recipe", "tiny-moe")
    assert len(stages) == 42
    assert stages[0]["name"] == "curation.ingest"
    assert "curation.ingest" in call("stage", "list")


def test_doctor_finds_a_sound_yard_and_a_broken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = {finding["check"]: finding for finding in call_json("doctor")["findings"]}
    assert findings["store"]["level"] == "ok"
    assert findings["database"]["level"] == "ok"
    assert "ok" in call("doctor")
    monkeypatch.setenv(
        "SAILYARD_DATABASE_URL", "postgresql://ann:hunter2@127.0.0.1:1/x?connect_timeout=1"
    )
    broken = call_json("doctor", code=1)
    assert not broken["ok"]
    database = next(f for f in broken["findings"] if f["check"] == "database")
    assert "SAILYARD_DATABASE_URL" in database["way_out"]
    assert "hunter2" not in json.dumps(broken)


def test_ingest_counts_what_can_be_used_and_says_what_cannot(tmp_path: Path) -> None:
    data = tmp_path / "mine"
    data.mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (i * 80, 0, 0)).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(f"a red square, number {i}")
    (data / "empty.jpg").write_bytes(b"")
    (data / "empty.txt").write_text("a picture that is not there")
    outcome = call_json("ingest", str(data))
    assert outcome["accepted"] == 3
    assert outcome["images"] == 3
    assert outcome["quarantined"] == sum(outcome["reasons"].values()) == 1
    (examples,) = outcome["examples"].values()
    assert "empty.jpg" in examples[0]["name"]
    text = call("ingest", str(data))
    assert "3 items can be used" in text
    assert next(iter(outcome["reasons"])) in text


def test_wrong_input_is_an_error_that_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"alignment\.warmup\.lrr: unknown field"):
        call("run", "--set", "alignment.warmup.lrr=1")
    with pytest.raises(ValueError, match=r"did you mean 'alignment\.warmup'"):
        call("run", "--from", "alignment.warmpu")
    with pytest.raises(RunError, match=r"there is no run '\.\./\.\./etc'"):
        call("run", "--resume", "../../etc")
    with pytest.raises(RunError, match="there are no data at"):
        call("run", "--data", str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="does not exist"):
        call("ingest", str(tmp_path / "nothing"))


def sailyard(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sailyard", *arguments], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.slow
def test_an_error_is_one_line_on_standard_error_and_exit_status_one() -> None:
    done = sailyard("stage", "run", "curation.text", "--run", "gone")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: there is no run 'gone' in file://")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_stage_runs_and_its_log_is_kept() -> None:
    run_id = create_run("micro", ["world.num_text=20"])
    done = sailyard("stage", "run", "curation.text", "--run", run_id)
    assert done.returncode == 0, done.stderr
    assert "curation.text: finished after" in done.stdout
    assert "curation.text: finished after" in call("stage", "log", "curation.text", "--run", run_id)
    again = sailyard("stage", "run", "curation.text", "--run", run_id)
    assert "curation.text: cached" in again.stdout
    forced = sailyard("stage", "run", "curation.text", "--run", run_id, "--force")
    assert "curation.text: finished after" in forced.stdout
