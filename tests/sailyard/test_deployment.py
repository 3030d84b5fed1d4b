"""Register, gate, promote: the entries, and what reusing them does to another database."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sailyard.deployment import (
    candidate_metrics,
    find_candidate,
    judge,
    restore_promotion,
    restore_version,
    run_gate,
    run_promote,
    run_register,
)
from sailyard.recipe import Recipe, load_recipe
from sailyard.stage import StageContext, StageError, local_context
from sailyard.stage.results import StageResult
from sailyard.yard import Yard
from tests.sailyard.evaluation_report import suite_summary, write_report
from tests.sailyard.stages import open_run

GATE = 'deployment.gate=[{metric: overall.accuracy, op: ">=", value: 0.5}]'


class Release:
    """The three stages one after the other, on one registry."""

    def __init__(self, folder: Path, *overrides: str, count: float = 0.75) -> None:
        self.folder = folder
        self.recipe: Recipe = load_recipe("micro", [GATE, *overrides])
        self.checkpoint = folder / "checkpoint"
        self.checkpoint.mkdir(parents=True)
        (self.checkpoint / "weights").write_text("w")
        digest = self.context("deployment.register", {"checkpoint": self.checkpoint}).input_digest(
            "checkpoint"
        )
        self.report = write_report(folder / "report", {"mixed_rl": digest}, count)
        inputs = {"checkpoint": self.checkpoint, "report": self.report}
        self.register = self.context("deployment.register", inputs)
        run_register(self.register)

    def context(self, stage: str, inputs: dict[str, Path]) -> StageContext:
        return local_context(self.folder, self.recipe, stage, inputs)

    def gate(self) -> StageContext:
        version = self.register.output("version")
        ctx = self.context("deployment.gate", {"version": version, "report": self.report})
        run_gate(ctx)
        return ctx

    def promote(self) -> StageContext:
        inputs = {
            "version": self.register.output("version"),
            "verdict": self.gate().output("verdict"),
        }
        ctx = self.context("deployment.promote", inputs)
        run_promote(ctx)
        return ctx


def test_a_version_that_passes_is_promoted(tmp_path: Path) -> None:
    release = Release(tmp_path)
    version = json.loads((release.register.output("version") / "version.json").read_text())
    assert (version["name"], version["candidate"]) == ("micro", "mixed_rl")
    assert version["conditions"]["prompt_hash"] == "ab" * 32
    gate = release.gate()
    verdict = json.loads((gate.output("verdict") / "verdict.json").read_text())
    assert verdict["passed"]
    assert verdict["rules"] == [
        {
            "metric": "overall.accuracy",
            "op": ">=",
            "value": 0.5,
            "actual": 0.625,
            "passed": True,
        }
    ]
    assert verdict["conditions"] == version["conditions"]
    ctx = release.promote()
    assert ctx.summary_values == {"version": "micro:1", "alias": "production", "promoted": True}
    current = ctx.registry.current("production")
    assert current is not None
    assert current.checkpoint == version["checkpoint"]
    assert current.metrics["overall.accuracy"] == 0.625
    assert ctx.registry.promotions()[0].actor == "pipeline"


def test_a_version_that_does_not_pass_is_refused_in_words(tmp_path: Path) -> None:
    release = Release(tmp_path, count=0.1)
    assert not release.gate().summary_values["passed"]
    with pytest.raises(StageError, match=r"overall\.accuracy is 0\.3, wanted >= 0\.5"):
        release.promote()
    assert release.register.registry.current("production") is None
    assert [v.ref for v in release.register.registry.versions()] == ["micro:1"]


def test_manual_approval_moves_nothing(tmp_path: Path) -> None:
    ctx = Release(tmp_path, "deployment.approval=manual").promote()
    promotion = json.loads((ctx.output("promotion") / "promotion.json").read_text())
    assert (promotion["promoted"], promotion["approval"]) == (False, "manual")
    assert ctx.registry.current("production") is None


def test_a_report_about_other_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="says nothing about checkpoint aaaaaaaaaaaa"):
        find_candidate({"digests": {"mixed_rl": "b" * 64}}, "a" * 64)


def test_gate_metrics_and_a_misspelt_one() -> None:
    report = suite_summary({"soup": {"count": 0.75, "colour": 0.1}})
    metrics = candidate_metrics(report, "soup")
    assert metrics["overall.accuracy"] == pytest.approx(0.425)
    assert metrics["overall.least_margin"] == pytest.approx(-0.1)
    assert metrics["count.margin"] == pytest.approx(0.5)
    assert metrics["colour.majority"] == 0.2
    for op, passed in ((">=", True), (">", False), ("<=", True), ("<", False)):
        assert judge(metrics, "count.accuracy", op, 0.75)["passed"] is passed
    with pytest.raises(StageError, match=r"did you mean 'overall\.accuracy'"):
        judge(metrics, "overall.acuracy", ">=", 0.5)


def test_reusing_a_release_restores_it_in_a_database_that_never_saw_it(tmp_path: Path) -> None:
    yard = Yard()
    ctx = Release(tmp_path / "elsewhere").promote()
    outputs = {
        "version": yard.artifacts.publish(ctx.input("version"), "version").digest,
        "promotion": yard.artifacts.publish(ctx.output("promotion"), "promotion").digest,
    }
    run = open_run(yard)
    result = StageResult("deployment.promote", "k", "finished", "run-0", outputs=outputs)
    restore_version(yard, run, result)
    restore_promotion(yard, run, result)
    current = yard.registry.current("production")
    assert current is not None
    assert current.ref == "micro:1"
    # Somebody promotes another; reusing the old run again must not undo that.
    yard.registry.register("micro", "f" * 64)
    yard.registry.promote("production", "micro:2")
    restore_version(yard, run, result)
    restore_promotion(yard, run, result)
    current = yard.registry.current("production")
    assert current is not None
    assert current.ref == "micro:2"
    assert len(yard.registry.versions()) == 2
