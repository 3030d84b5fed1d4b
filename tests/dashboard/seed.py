"""A yard with two runs in it, written through the ground floor's own doors.

The figures are made up; the rows, artifacts and files are real ones.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from sailyard.lineage import ArtifactInfo, Point, records
from sailyard.media import encode_png
from sailyard.pipeline import EVALUATED, Stage
from sailyard.runs import create_run, load_run, log_key
from sailyard.samples import SKILLS, Sample, write_samples
from sailyard.yard import Yard

TRAINED = ("bootstrap", "alignment", "pretraining", "post_training")
JUDGES = ("ita_score", "ita_yorn", "vir_score", "vir_yorn")
FAILED = "alignment.fine_grained"


def seed(yard: Yard, folder: Path) -> tuple[str, str]:
    """A finished run and a later one that reused its curation and then failed."""
    first = create_run("tiny", yard=yard)
    made: dict[str, str] = {}
    stages = load_run(first, yard).pipeline.stages
    for stage in stages:
        _finish(yard, first, stage, made, folder)
    second = create_run("tiny", ["alignment.warmup.lr=1e-3"], yard=yard)
    for stage in stages:
        if stage.group in ("curation", "bootstrap") and "rl_" not in stage.name:
            _reuse(yard, second, first, stage, made)
    _fail(yard, second, FAILED)
    checkpoint, report = made["post_training.mixed_rl/checkpoint"], made["evaluation.suite/report"]
    metrics = {"accuracy": 0.74, "least_margin": 0.21}
    registry = yard.registry
    registry.register("tiny", checkpoint, report=report, run_id=first, metrics=metrics)
    soup = made["post_training.soup/checkpoint"]
    registry.register("tiny", soup, run_id=first, metrics={"accuracy": 0.69, "least_margin": 0.1})
    registry.promote("production", "tiny:1", actor="pipeline", reason="passed the gate")
    return first, second


def _finish(yard: Yard, run_id: str, stage: Stage, made: dict[str, str], folder: Path) -> None:
    inputs = {name: made[source] for name, source in stage.inputs.items()}
    row = records.start_stage(yard.database, run_id, stage.name, "k" * 64, inputs, resumes=False)
    outputs = {}
    for name in stage.outputs:
        directory = folder / stage.name / name
        directory.mkdir(parents=True)
        _fill(directory, stage, name)
        kind = f"{stage.name}/{name}"
        artifact = yard.artifacts.publish(directory, kind, {"stage": stage.name})
        made[f"{stage.name}/{name}"] = artifact.digest
        outputs[name] = ArtifactInfo(
            artifact.digest, kind, artifact.size, len(artifact.files), artifact.meta
        )
    if stage.group in TRAINED:
        points = [
            Point(name, step, value)
            for step in range(30)
            for name, value in (
                ("loss", 2 * math.exp(-step / 8)),
                ("lr", 1e-3 * (1 - step / 30)),
                ("grad_norm", float("nan") if step == 3 else 1.0),
            )
        ]
        records.beat(yard.database, row, points, (30, 30, "loss 0.05"))
    yard.store.put(log_key(run_id, stage.name), f"{stage.name} began\nall done\n".encode())
    records.finish_stage(
        yard.database,
        row,
        "finished",
        seconds=3.0 + len(stage.name),
        summary=_summary(stage.name),
        outputs=outputs,
    )


def _reuse(yard: Yard, run_id: str, source: str, stage: Stage, made: dict[str, str]) -> None:
    infos = {}
    for name in stage.outputs:
        artifact = yard.artifacts.get(made[f"{stage.name}/{name}"])
        infos[name] = ArtifactInfo(
            artifact.digest, artifact.kind, artifact.size, len(artifact.files)
        )
    records.record_cached(
        yard.database,
        run_id,
        stage.name,
        "k" * 64,
        {name: made[origin] for name, origin in stage.inputs.items()},
        infos,
        source_run_id=source,
        computed_seconds=9.0,
        summary=_summary(stage.name),
    )


def _fail(yard: Yard, run_id: str, stage: str) -> None:
    row = records.start_stage(yard.database, run_id, stage, "f" * 64, {}, resumes=False)
    yard.store.put(log_key(run_id, stage), b"step 1\nstep 2\nValueError: no such luck\n")
    records.finish_stage(
        yard.database, row, "failed", seconds=2.0, summary={}, error="ValueError: no such luck"
    )


def _fill(directory: Path, stage: Stage, output: str) -> None:
    if output == "quarantine":
        line = {"origin": "mine", "name": "cat.jpg", "reason": "truncated", "detail": "cut off"}
        (directory / "rejected.jsonl").write_text(json.dumps(line) + "\n")
    elif output == "report":
        _write_report(directory)
    elif stage.group == "curation" and output != "judges":
        write_samples(directory, _samples(output == "dropped"))
    else:
        (directory / "config.json").write_text(json.dumps({"stage": stage.name, "as": output}))


def _samples(dropped: bool) -> list[Sample]:
    meta: dict[str, Any] = {"judged": {"ita": 2 if dropped else 5, "vir": 4}}
    if dropped:
        meta["dropped_because"] = ["ita_score below 3"]
    return [
        Sample(
            id=f"{'bad' if dropped else 'good'}-{index}",
            source="microworld",
            task="caption",
            messages=[
                {"role": "user", "content": "<image>\nDescribe *this* [picture]."},
                {"role": "assistant", "content": "a red circle"},
            ],
            images=[_picture(index)],
            meta=meta,
        )
        for index in range(5)
    ]


def _picture(index: int) -> bytes:
    image = Image.new("RGB", (84, 84), "white")
    ImageDraw.Draw(image).ellipse((10 + index * 6, 20, 50 + index * 6, 60), fill="red")
    return encode_png(image)


def _write_report(directory: Path) -> None:
    names = [name.split(".")[1] for name in EVALUATED]
    skills = SKILLS[:8]
    floor = dict.fromkeys(skills, 0.25)
    checkpoints = {
        name: {
            "accuracy": 0.3 + 0.04 * place,
            "accuracy_thinking": 0.32 + 0.04 * place,
            "least_margin": 0.01 * place,
            "modes": {
                "direct": _mode(dict.fromkeys(skills, 0.3 + 0.04 * place)),
                **({"thinking": _mode({"count": 0.8, "sum": 0.9}, 0.97)} if place > 5 else {}),
            },
            "seconds": 1.0,
        }
        for place, name in enumerate(names)
    }
    (directory / "images").mkdir()
    (directory / "images" / "000.png").write_bytes(_picture(1))
    report = {
        "harness": {"name": "sailyard.evaluation.suite", "version": 1},
        "prompt_hash": "p" * 64,
        "token_budget": {"direct": 48, "thinking": 256},
        "heldout": {"digest": "d" * 64, "questions": 80, "per_skill": dict.fromkeys(skills, 10)},
        "baseline": {"overall": 0.25, "skills": floor, "answers": dict.fromkeys(skills, "1")},
        "checkpoints": checkpoints,
        "digests": dict.fromkeys(names, "c" * 64),
        "paper": {
            "opencompass": {"SAIL-VL2-2B": {"AI2D": 83.0, "average": 70.31}},
            "reasoning": {"SAIL-VL2-2B-Thinking": {"MathVista": 68.5, "average": 40.9}},
            "alignment": {"Qwen3-0.6B": {"nearest_neighbour": [1.42, 1.15]}},
            "judges": {name: [0.92, 0.9] for name in JUDGES},
        },
        "examples": [
            {
                "id": "q-0",
                "skill": "count",
                "question": "How many circles?",
                "answer": "1",
                "image": "images/000.png",
                "replies": {name: {"direct": {"reply": "1", "right": True}} for name in names},
            }
        ],
    }
    (directory / "report.json").write_text(json.dumps(report, sort_keys=True))


def _mode(skills: dict[str, float], format_rate: float | None = None) -> dict[str, Any]:
    body = {"overall": 0.5, "skills": skills, "mean_tokens": 3.2, "unfinished": 0.0}
    return body | ({"format_rate": format_rate} if format_rate is not None else {})


def _summary(stage: str) -> dict[str, Any]:
    known: dict[str, dict[str, Any]] = {
        "curation.ingest": {
            "num_samples": {"captions": 90, "reference": 30},
            "quarantine": {"truncated": 2, "bomb": 1},
            "num_quarantined": 3,
        },
        "curation.caption2": {
            "judged": 90,
            "kept": 70,
            "dropped": 20,
            "reasons": {"ita_score below 3": 15, "vir: No": 9},
        },
        "curation.rl_data": {"examined": 50, "kept": 20, "always_right": 25, "never_right": 5},
        "curation.mix_multitask": {
            "num_samples": 100,
            "sources": {"captions": {"available": 70, "drawn": 60}},
            "ngram_entropy": {"before": {"2": 0.7}, "after": {"2": 0.8}},
        },
        "curation.judges": {
            "judges": {name: {"precision": 0.95, "recall": 0.93} for name in JUDGES}
        },
        "alignment.warmup": {"nearest_neighbour_before": 2.0, "nearest_neighbour_after": 1.8},
        "alignment.world_knowledge": {
            "nearest_neighbour_before": 1.6,
            "nearest_neighbour_after": 1.5,
        },
    }
    return known.get(stage, {"loss_first": 2.0, "loss_last": 0.1, "nested": {"deep": [1, 2]}})
