"""Entries of the stages that release a model: register it, hold it against the gate, promote it."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sailyard.stage.errors import StageError

if TYPE_CHECKING:
    from sailyard.registry import ModelVersion
    from sailyard.runs import Run
    from sailyard.stage import StageContext
    from sailyard.stage.results import StageResult
    from sailyard.yard import Yard

_COMPARE = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}

CONDITIONS = ("harness", "prompt_hash", "token_budget", "heldout")
"""What a score was measured under; kept beside every score that leaves the report."""


def run_register(ctx: StageContext) -> None:
    """Stage ``deployment.register``: enter the checkpoint with its figures.

    ``version.json`` names the version by what it is (model name and checkpoint digest), not by
    its number, which another registry may give otherwise.
    """
    report = _read(ctx.input("report") / "report.json")
    checkpoint = ctx.input_digest("checkpoint")
    candidate = find_candidate(report, checkpoint)
    body = {
        "name": ctx.section("name"),
        "checkpoint": checkpoint,
        "report": ctx.input_digest("report"),
        "candidate": candidate,
        "metrics": candidate_metrics(report, candidate),
        "conditions": {name: report.get(name) for name in CONDITIONS},
    }
    version = _register(ctx.registry, body, ctx.run_id)
    _write(ctx.output("version") / "version.json", body)
    ctx.summary(version=version.ref, checkpoint=checkpoint, metrics=body["metrics"])


def run_gate(ctx: StageContext) -> None:
    """Stage ``deployment.gate``: hold the version's figures against the recipe's rules.

    A version that does not pass is a finding, not a failure: the verdict says which rule
    stopped it, and ``deployment.promote`` refuses it.
    """
    version = _read(ctx.input("version") / "version.json")
    rules = [
        judge(version["metrics"], rule.metric, rule.op, rule.value)
        for rule in ctx.section("deployment").gate
    ]
    passed = all(rule["passed"] for rule in rules)
    verdict = {
        "passed": passed,
        "rules": rules,
        "name": version["name"],
        "checkpoint": version["checkpoint"],
        "conditions": version["conditions"],
    }
    _write(ctx.output("verdict") / "verdict.json", verdict)
    ctx.summary(passed=passed, rules=rules)


def run_promote(ctx: StageContext) -> None:
    """Stage ``deployment.promote``: point the alias at a version that passed.

    With manual approval nothing moves; ``sailyard promote`` or the promotion DAG does it.

    Raises:
        StageError: The gate refused the version.
    """
    deployment = ctx.section("deployment")
    version = _read(ctx.input("version") / "version.json")
    verdict = _read(ctx.input("verdict") / "verdict.json")
    if not verdict["passed"]:
        broken = [_in_words(rule) for rule in verdict["rules"] if not rule["passed"]]
        raise StageError(f"the gate refuses {version['name']}: {'; '.join(broken)}")
    promoted = deployment.approval == "auto"
    registered = _register(ctx.registry, version, ctx.run_id)
    if promoted:
        ctx.registry.promote(
            deployment.alias,
            registered.ref,
            actor="pipeline",
            reason=f"passed the gate in run {ctx.run_id}",
            run_id=ctx.run_id,
        )
    body = {
        "alias": deployment.alias,
        "name": version["name"],
        "checkpoint": version["checkpoint"],
        "promoted": promoted,
        "approval": deployment.approval,
    }
    _write(ctx.output("promotion") / "promotion.json", body)
    ctx.summary(version=registered.ref, alias=deployment.alias, promoted=promoted)


def restore_version(yard: Yard, run: Run, result: StageResult) -> None:
    """A reused registration, in a database that may not have it."""
    folder = yard.artifacts.fetch(result.outputs["version"])
    _register(yard.registry, _read(folder / "version.json"), run.id)


def restore_promotion(yard: Yard, run: Run, result: StageResult) -> None:
    """A reused promotion, in a database that never saw it.

    Where the alias has pointed at this checkpoint before, it stays where it is now: somebody
    moved it on, or back, and a run that did nothing new has no say in that.
    """
    body = _read(yard.artifacts.fetch(result.outputs["promotion"]) / "promotion.json")
    if not body["promoted"] or yard.registry.was_promoted(body["alias"], body["checkpoint"]):
        return
    version = yard.registry.find(body["name"], body["checkpoint"])
    if version is not None:
        reason = f"promoted by run {result.run_id}, reused by run {run.id}"
        yard.registry.promote(
            body["alias"], version.ref, actor="pipeline", reason=reason, run_id=run.id
        )


def find_candidate(report: Mapping[str, Any], checkpoint: str) -> str:
    """The report's name for a checkpoint, by digest.

    Raises:
        StageError: The report is about other checkpoints.
    """
    named: dict[str, str] = {digest: name for name, digest in report["digests"].items()}
    if checkpoint not in named:
        raise StageError(
            f"the evaluation report says nothing about checkpoint {checkpoint[:12]}; "
            "run evaluation.suite on it first"
        )
    return named[checkpoint]


def candidate_metrics(report: Mapping[str, Any], candidate: str) -> dict[str, float]:
    """The figures a gate rule can name.

    ``overall.accuracy``, ``overall.accuracy_thinking``, ``overall.majority`` and
    ``overall.least_margin`` (the worst skill's lead over its majority class), and for every
    skill ``<skill>.accuracy``, ``<skill>.majority`` and ``<skill>.margin``; shares from 0 to 1.
    """
    entry = report["checkpoints"][candidate]
    majority = report["baseline"]["skills"]
    metrics = {
        "overall.accuracy": entry["accuracy"],
        "overall.accuracy_thinking": entry["accuracy_thinking"],
        "overall.majority": report["baseline"]["overall"],
        "overall.least_margin": entry["least_margin"],
    }
    for skill, accuracy in entry["modes"]["direct"]["skills"].items():
        metrics[f"{skill}.accuracy"] = accuracy
        metrics[f"{skill}.majority"] = majority[skill]
        metrics[f"{skill}.margin"] = accuracy - majority[skill]
    return {name: float(value) for name, value in metrics.items()}


def judge(metrics: Mapping[str, float], metric: str, op: str, value: float) -> dict[str, Any]:
    """One rule, and how it went.

    Raises:
        StageError: There is no such metric; the message names the nearest.
    """
    if metric not in metrics:
        near = get_close_matches(metric, metrics, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise StageError(f"deployment.gate names the metric {metric!r}, which is not there{hint}")
    actual = metrics[metric]
    passed = bool(_COMPARE[op](actual, value))
    return {"metric": metric, "op": op, "value": value, "actual": actual, "passed": passed}


def _in_words(rule: Mapping[str, Any]) -> str:
    return f"{rule['metric']} is {rule['actual']:.4g}, wanted {rule['op']} {rule['value']:g}"


def _register(registry: Any, body: Mapping[str, Any], run_id: str) -> ModelVersion:
    version: ModelVersion = registry.register(
        body["name"],
        body["checkpoint"],
        report=body["report"],
        run_id=run_id,
        metrics=body["metrics"],
    )
    return version


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, body: Mapping[str, Any]) -> None:
    text = json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
