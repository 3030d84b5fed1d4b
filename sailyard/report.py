"""``sailyard report``: one object that says what a run achieved.

Everything is read from the summaries that stages left in lineage; ``docs/report.md`` lists the
keys. A figure whose stage has not finished is null, never invented.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sailyard.registry import ModelVersion
    from sailyard.runs import StageState
    from sailyard.yard import Yard

JUDGES = ("ita_score", "ita_yorn", "vir_score", "vir_yorn")
ALIGNMENT = ("alignment.warmup", "alignment.fine_grained", "alignment.world_knowledge")
DISTANCES = ("nearest_neighbour", "wasserstein", "mean_distance")
RL = ("post_training.verifiable_rl", "post_training.mixed_rl")
INGREDIENTS = ("base_sft_4", "base_sft_4_sibling")

# The paper's own figures, shown beside ours: Table 7, before and after alignment.
PAPER_DISTANCES = {"nearest_neighbour": (1.42, 1.15), "wasserstein": (4.86, 3.88)}

Summaries = Mapping[str, Mapping[str, Any]]
Table = tuple[str, Sequence[str], list[Sequence[Any]]]


class NothingToReport(ValueError):
    """There is no run yet."""


def build_report(yard: Yard, run_id: str = "") -> dict[str, Any]:
    """The report of a run, by default of the latest.

    Raises:
        NothingToReport: There is no run.
        RunError: There is no such run.
    """
    from sailyard.lineage import queries
    from sailyard.runs import stage_state

    if not run_id:
        latest = queries.latest_run(yard.database)
        if latest is None:
            raise NothingToReport("there is no run yet; start one: sailyard run --recipe tiny")
        run_id = latest.id
    states = stage_state(run_id, yard)
    run = queries.get_run(yard.database, run_id)
    recipe = queries.run_recipe(yard.database, run_id)
    alias = recipe["deployment"]["alias"]
    summaries = {s.stage: s.info.summary for s in states if s.info and s.status == "finished"}
    return {
        "run": {
            "id": run.id,
            "recipe": run.recipe_name,
            "status": run.status,
            "created_at": run.created_at.isoformat(),
            "overrides": list(run.overrides),
            "stages_finished": run.num_finished,
            "stages": run.num_stages,
            "seconds": sum(s.info.seconds for s in states if s.info),
            "computed_seconds": sum(s.info.computed_seconds for s in states if s.info),
        },
        "stages": [_stage(state) for state in states],
        "judges": _judges(summaries),
        "alignment": _alignment(summaries),
        "losses": _pairs(summaries, "loss_first", "loss_last"),
        "adalrs": _adalrs(summaries),
        "soup": _soup(summaries),
        "rl": {stage: _rl(summaries.get(stage, {})) for stage in RL},
        "evaluation": _evaluation(summaries),
        "packing": _pairs(summaries, "packing_fill", "padding_ratio"),
        "frozen_parts_unchanged": {
            stage: summary["frozen_parts_unchanged"]
            for stage, summary in summaries.items()
            if "frozen_parts_unchanged" in summary
        },
        "gate": summaries.get("deployment.gate") or None,
        "promoted": _promoted(alias, yard.registry.current(alias), summaries),
    }


def _stage(state: StageState) -> dict[str, Any]:
    info = state.info
    return {
        "name": state.stage,
        "group": state.group,
        "status": state.status,
        "cached": state.cached,
        "seconds": info.seconds if info else None,
        "computed_seconds": info.computed_seconds if info else None,
        "attempts": info.attempt if info else 0,
        "source_run": info.source_run_id if info else None,
        "error": (info.error or None) if info else None,
        "metrics": info.summary if info else {},
    }


def _judges(summaries: Summaries) -> dict[str, Any]:
    found = summaries.get("curation.judges", {})
    # Four entries, either at the top of the summary or under "judges".
    judges = found.get("judges", found)
    return {name: _pick(judges.get(name, {}), "precision", "recall") for name in JUDGES}


def _alignment(summaries: Summaries) -> dict[str, Any]:
    stages = {
        stage: {
            name: _change(summary.get(f"{name}_before"), summary.get(f"{name}_after"))
            for name in DISTANCES
        }
        for stage in ALIGNMENT
        if (summary := summaries.get(stage)) is not None
    }
    first, last = stages.get(ALIGNMENT[0], {}), stages.get(ALIGNMENT[-1], {})
    overall = {
        name: _change(
            first.get(name, {}).get("before"),
            last.get(name, {}).get("after"),
        )
        for name in DISTANCES
    }
    paper = {name: _change(*figures) for name, figures in PAPER_DISTANCES.items()}
    return {"stages": stages, "overall": overall, "paper": paper}


def _change(before: float | None, after: float | None) -> dict[str, float | None]:
    """Before, after, and by which share it fell (0.19 is 19 % lower)."""
    fall = None if before is None or after is None or before == 0 else 1 - after / before
    return {"before": before, "after": after, "reduction": fall}


def _adalrs(summaries: Summaries) -> dict[str, Any]:
    basic = summaries.get("pretraining.basic", {})
    adalrs, fixed = basic.get("adalrs") or {}, basic.get("fixed") or {}
    return {
        "adalrs": _pick(adalrs, "loss_last", "lr_last", "events"),
        "fixed": _pick(fixed, "loss_last"),
    }


def _soup(summaries: Summaries) -> dict[str, Any]:
    """The soup against its ingredients, by the suite's overall accuracy."""
    found = summaries.get("evaluation.suite", {}).get("checkpoints", {})
    accuracy = {name: entry.get("accuracy") for name, entry in found.items()}
    return {
        "accuracy": accuracy.get("soup"),
        "ingredients": {name: accuracy.get(name) for name in INGREDIENTS},
    }


def _rl(summary: Mapping[str, Any]) -> dict[str, Any]:
    names = ("reward_first", "reward_last", "heldout_reward_before", "heldout_reward_after")
    return _pick(summary, *names)


def _evaluation(summaries: Summaries) -> dict[str, Any]:
    suite = summaries.get("evaluation.suite", {})
    baseline = suite.get("baseline", {})
    checkpoints = {}
    for name, entry in suite.get("checkpoints", {}).items():
        modes = entry.get("modes", {})
        checkpoints[name] = {
            "overall": entry.get("accuracy"),
            "overall_thinking": entry.get("accuracy_thinking"),
            "per_skill": modes.get("direct", {}).get("skills", {}),
            "per_skill_thinking": modes.get("thinking", {}).get("skills", {}),
            "format_rate": modes.get("thinking", {}).get("format_rate"),
        }
    return {
        "checkpoints": checkpoints,
        "majority": {
            "overall": baseline.get("overall"),
            "per_skill": baseline.get("skills", {}),
        },
        "conditions": _pick(suite, "harness", "prompt_hash", "token_budget", "heldout"),
    }


def _promoted(alias: str, version: ModelVersion | None, summaries: Summaries) -> dict[str, Any]:
    """What the alias points at now, and whether this run put a version there."""
    own = summaries.get("deployment.promote", {})
    return {
        "alias": alias,
        "version": version.ref if version else None,
        "checkpoint": version.checkpoint if version else None,
        "registered_by": version.run_id if version else None,
        "by_this_run": own.get("version") if own.get("promoted") else None,
    }


def _pairs(summaries: Summaries, *names: str) -> dict[str, dict[str, Any]]:
    """Stage -> the named figures, for stages that report the first of them."""
    return {
        stage: _pick(summary, *names)
        for stage, summary in summaries.items()
        if summary.get(names[0]) is not None
    }


def _pick(source: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: source.get(name) for name in names}


def report_tables(body: Mapping[str, Any]) -> Iterator[Table]:
    """The report as tables for a terminal: (title, columns, rows), empty ones left out."""
    run = body["run"]
    title = f"{run['id']}: {run['status']}, {run['stages_finished']} of {run['stages']} stages"
    yield (
        title,
        ("stage", "status", "seconds"),
        [
            (
                stage["name"],
                "cached" if stage["cached"] else stage["status"],
                _figure(stage["computed_seconds"], 1),
            )
            for stage in body["stages"]
        ],
    )
    for name, columns, rows in _figure_tables(body):
        if rows:
            yield name, columns, rows


def _figure_tables(body: Mapping[str, Any]) -> Iterator[Table]:
    yield (
        "judges",
        ("judge", "precision", "recall"),
        [
            (name, _figure(judge["precision"]), _figure(judge["recall"]))
            for name, judge in body["judges"].items()
            if judge["precision"] is not None
        ],
    )
    yield (
        "alignment distances",
        ("stage", "distance", "before", "after", "lower by"),
        [
            (stage, name, _figure(d["before"]), _figure(d["after"]), _share(d["reduction"]))
            for stage, distances in [
                *body["alignment"]["stages"].items(),
                ("all three", body["alignment"]["overall"]),
            ]
            for name, d in distances.items()
            if d["after"] is not None
        ],
    )
    losses, packing = body["losses"], body["packing"]
    yield (
        "training",
        ("stage", "loss first", "loss last", "packing fill", "padding"),
        [
            (
                stage,
                _figure(loss["loss_first"]),
                _figure(loss["loss_last"]),
                _share(packing.get(stage, {}).get("packing_fill")),
                _share(packing.get(stage, {}).get("padding_ratio")),
            )
            for stage, loss in losses.items()
        ],
    )
    yield (
        "reinforcement",
        ("stage", "reward first", "last", "held-out before", "after"),
        [
            (stage, *[_figure(value) for value in figures.values()])
            for stage, figures in body["rl"].items()
            if figures["reward_last"] is not None
        ],
    )
    yield _accuracy_table(body["evaluation"])
    yield _accuracy_table(body["evaluation"], "_thinking")
    promoted = body["promoted"]
    yield (
        "serving",
        ("alias", "version", "registered by"),
        [(promoted["alias"], promoted["version"], promoted["registered_by"])]
        if promoted["version"]
        else [],
    )


def _accuracy_table(evaluation: Mapping[str, Any], thinking: str = "") -> Table:
    """Accuracy by checkpoint and skill; with `thinking` "_thinking", of skills thought about.

    `overall` is of all skills in both tables: thinking only changes how some are answered.
    """
    asked = {
        name: (entry[f"overall{thinking}"], entry[f"per_skill{thinking}"])
        for name, entry in evaluation["checkpoints"].items()
        if entry[f"per_skill{thinking}"]
    }
    majority = evaluation["majority"]
    found_skills = {skill for _, found in asked.values() for skill in found}
    skills = [skill for skill in majority["per_skill"] if skill in found_skills]
    rows: list[Sequence[Any]] = [
        (name, _figure(overall, 2), *[_figure(found.get(skill), 2) for skill in skills])
        for name, (overall, found) in asked.items()
    ]
    if rows:
        floor = [_figure(majority["per_skill"][skill], 2) for skill in skills]
        rows.append(("majority class", _figure(majority["overall"], 2), *floor))
    title = "held-out accuracy" + (", asked to think" if thinking else "")
    return title, ("checkpoint", "overall", *skills), rows


def _figure(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
