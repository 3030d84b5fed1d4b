"""An evaluation report as the suite writes it, made by the suite's own code."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

SKILLS = ("count", "colour")
MAJORITY = {"count": 0.25, "colour": 0.2}


def suite_summary(accuracies: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The suite's summary for checkpoints with these accuracies per skill."""
    from evaluation.suite import CheckpointResult, ModeResult

    checkpoints = {}
    for name, skills in accuracies.items():
        direct = ModeResult(skills, {}, 3.0, 0.0)
        thinking = ModeResult({"count": skills["count"]}, {}, 20.0, 0.0, format_rate=0.9)
        result = CheckpointResult({"direct": direct, "thinking": thinking}, 1.0)
        checkpoints[name] = result.summary(MAJORITY)
    return {
        "harness": {"name": "sailyard.evaluation.suite", "version": 1},
        "prompt_hash": "ab" * 32,
        "token_budget": {"direct": 48, "thinking": 96},
        "heldout": {"digest": "cd" * 32, "questions": 8},
        "baseline": {"overall": mean(MAJORITY.values()), "skills": MAJORITY},
        "checkpoints": checkpoints,
    }


def write_report(folder: Path, digests: dict[str, str], count: float = 0.75) -> Path:
    """A report directory about checkpoints with these digests."""
    folder.mkdir(parents=True)
    body = suite_summary({name: {"count": count, "colour": 0.5} for name in digests})
    (folder / "report.json").write_text(json.dumps({**body, "digests": digests}))
    return folder
