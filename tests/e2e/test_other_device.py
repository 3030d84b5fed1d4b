"""Everything that computes does so on the machine's device, and leaves no tensor on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = {
    # Tiles and experts through all stages that compute; the rest of the graph loads no model.
    "experts": [
        "micro-moe",
        "evaluation.suite",
        "evaluation.suite.per_skill=1",
        "post_training.base_sft_2.optimizer=muon",
        "post_training.base_sft_3.activation_checkpointing=true",
    ],
    "images of any size": [
        "micro",
        "alignment.warmup",
        "model.any_resolution=true",
        "model.max_patches=256",
        "model.vision.rope_2d=true",
    ],
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", list(CASES))
def test_a_pipeline_on_a_device_that_is_not_the_cpu(case: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.pretend_run", *CASES[case]]
    environment = {**os.environ, "SAILYARD_HOME": str(tmp_path)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    where = json.loads(done.stdout.splitlines()[-1])
    assert {"serving", CASES[case][1]} <= where.keys()
    for stage, devices in where.items():
        assert devices == ["pretend"], stage
