"""The report: every figure from a stage's summary, nothing invented for what is missing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sailyard.lineage import records
from sailyard.report import NothingToReport, build_report, report_tables
from sailyard.runs import create_run
from sailyard.yard import Yard
from tests.sailyard.evaluation_report import MAJORITY, suite_summary

TRAINING = {
    "loss_first": 4.0,
    "loss_last": 1.0,
    "tokens": 1000,
    "steps": 10,
    "packing_fill": 0.97,
    "padding_ratio": 0.03,
    "frozen_parts_unchanged": True,
}


def aligned(before: float, after: float) -> dict[str, Any]:
    names = ("nearest_neighbour", "wasserstein", "mean_distance")
    return {
        **TRAINING,
        **{f"{name}_before": before for name in names},
        **{f"{name}_after": after for name in names},
    }


def finish(yard: Yard, run_id: str, stage: str, summary: dict[str, Any]) -> None:
    row = records.start_stage(yard.database, run_id, stage, "k", {}, resumes=False)
    records.finish_stage(yard.database, row, "finished", seconds=2.0, summary=summary)


@pytest.fixture
def yard() -> Yard:
    return Yard()


@pytest.fixture
def run_id(yard: Yard) -> str:
    """A run whose reporting stages have finished."""
    run_id = create_run("micro", yard=yard)
    quality = {"precision": 0.95, "recall": 0.92, "accuracy": 0.9}
    judges = dict.fromkeys(("ita_score", "ita_yorn", "vir_score", "vir_yorn"), quality)
    accuracies = {
        "base_sft_4": {"count": 0.5, "colour": 0.6},
        "base_sft_4_sibling": {"count": 0.4, "colour": 0.6},
        "soup": {"count": 0.6, "colour": 0.7},
        "mixed_rl": {"count": 0.8, "colour": 0.9},
    }
    rewards = {
        "reward_first": 0.3,
        "reward_last": 0.5,
        "heldout_reward_before": 0.31,
        "heldout_reward_after": 0.52,
    }
    adalrs = {"loss_last": 0.9, "lr_last": 6e-4, "events": [{"step": 3, "lr": 6e-4}]}
    summaries = {
        "curation.judges": {**TRAINING, "judges": judges},
        "alignment.warmup": aligned(2.0, 1.8),
        "alignment.fine_grained": aligned(1.8, 1.7),
        "alignment.world_knowledge": aligned(1.7, 1.5),
        "pretraining.basic": {**TRAINING, "adalrs": adalrs, "fixed": {"loss_last": 1.1}},
        "post_training.verifiable_rl": rewards,
        "evaluation.suite": suite_summary(accuracies),
        "deployment.promote": {"version": "micro:1", "promoted": True, "alias": "production"},
    }
    for stage, summary in summaries.items():
        finish(yard, run_id, stage, summary)
    version = yard.registry.register("micro", "a" * 64, run_id=run_id)
    yard.registry.promote("production", version.ref)
    return run_id


def test_without_a_run_the_report_says_what_to_do(yard: Yard) -> None:
    with pytest.raises(NothingToReport, match="sailyard run --recipe tiny"):
        build_report(yard)


def test_every_figure_comes_from_its_stage(yard: Yard, run_id: str) -> None:
    body = build_report(yard)
    assert body["run"]["id"] == run_id
    assert (body["run"]["stages_finished"], body["run"]["stages"]) == (8, 41)
    stages = {stage["name"]: stage for stage in body["stages"]}
    assert len(stages) == 41
    assert stages["alignment.warmup"]["status"] == "finished"
    assert stages["alignment.warmup"]["seconds"] == 2.0
    assert stages["alignment.warmup"]["metrics"]["tokens"] == 1000
    assert stages["curation.ingest"]["status"] == "pending"
    assert body["judges"]["vir_yorn"] == {"precision": 0.95, "recall": 0.92}
    overall = body["alignment"]["overall"]["nearest_neighbour"]
    assert overall == {"before": 2.0, "after": 1.5, "reduction": 0.25}
    assert body["alignment"]["paper"]["nearest_neighbour"]["reduction"] == pytest.approx(
        0.19, abs=0.005
    )
    assert body["losses"]["pretraining.basic"] == {"loss_first": 4.0, "loss_last": 1.0}
    assert body["adalrs"]["adalrs"]["lr_last"] == 6e-4
    assert body["adalrs"]["fixed"] == {"loss_last": 1.1}
    assert body["soup"]["accuracy"] == pytest.approx(0.65)
    assert body["soup"]["ingredients"]["base_sft_4_sibling"] == pytest.approx(0.5)
    assert body["rl"]["post_training.verifiable_rl"]["heldout_reward_after"] == 0.52
    mixed = body["evaluation"]["checkpoints"]["mixed_rl"]
    assert mixed["per_skill"] == {"count": 0.8, "colour": 0.9}
    assert mixed["format_rate"] == 0.9
    assert body["evaluation"]["majority"]["per_skill"] == MAJORITY
    assert body["evaluation"]["conditions"]["prompt_hash"] == "ab" * 32
    assert body["packing"]["alignment.warmup"] == {"packing_fill": 0.97, "padding_ratio": 0.03}
    assert body["frozen_parts_unchanged"]["alignment.warmup"] is True
    assert body["promoted"]["version"] == "micro:1"
    assert body["promoted"]["by_this_run"] == "micro:1"


def test_what_has_not_finished_is_null(yard: Yard, run_id: str) -> None:
    body = build_report(yard, run_id)
    mixed = body["rl"]["post_training.mixed_rl"]
    assert set(mixed.values()) == {None}
    empty = build_report(yard, create_run("micro", yard=yard))
    assert set(empty["judges"]["ita_score"].values()) == {None}
    assert empty["alignment"]["overall"]["wasserstein"]["reduction"] is None
    assert empty["evaluation"]["checkpoints"] == {}
    assert empty["soup"]["accuracy"] is None
    assert empty["gate"] is None
    assert list(report_tables(empty))


def test_the_report_is_one_json_object_and_a_few_tables(yard: Yard, run_id: str) -> None:
    body = build_report(yard, run_id)
    assert json.loads(json.dumps(body, allow_nan=False)) == body
    tables = {title.split(":")[0]: (columns, rows) for title, columns, rows in report_tables(body)}
    assert set(tables) == {
        run_id,
        "judges",
        "alignment distances",
        "training",
        "reinforcement",
        "held-out accuracy",
        "held-out accuracy, asked to think",
        "serving",
    }
    for columns, rows in tables.values():
        assert all(len(row) == len(columns) for row in rows)
    columns, rows = tables["held-out accuracy"]
    assert tuple(columns) == ("checkpoint", "overall", "count", "colour")
    assert rows[-1][0] == "majority class"
    columns, rows = tables["held-out accuracy, asked to think"]
    assert tuple(columns) == ("checkpoint", "overall", "count")
