"""``sailyard model``: tables, JSON, exit statuses, errors in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from model.checkpoint import load_model, save_model
from model.shards import CheckpointError
from sailyard.cli import commands
from tests.model.tiny import network, processor

ROOT = Path(__file__).parents[2]


def call(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(commands, ["model", *arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def test_count_as_table_and_as_json():
    assert "2,730,565,120" in call("count", "--recipe", "2b").stdout
    found = json.loads(call("count", "--recipe", "2b", "--json").stdout)
    assert found["recipe"] == "2b"
    assert (found["stored"], found["distinct"]) == (2_730_565_120, 2_419_400_192)
    assert found["bytes"] == {"bfloat16": 5_461_130_240, "float32": 10_922_260_480}
    assert found["vision"] == 682_031_616


def test_convert_and_inspect(tmp_path):
    ours, released, again = (str(tmp_path / name) for name in ("ours", "released", "again"))
    save_model(ours, network(), processor())
    assert "released layout" in call("convert", ours, released, "--to", "released").stdout
    found = json.loads(call("inspect", released, "--json").stdout)
    assert (found["layout"], found["dtypes"]) == ("released", ["torch.float32"])
    assert found["problem"] == ""
    call("convert", released, again, "--to", "native")
    load_model(again)
    with pytest.raises(CheckpointError, match="not an empty directory"):
        call("convert", released, again, "--to", "native")
    (Path(released) / "model.safetensors").unlink()
    broken = json.loads(call("inspect", released, "--json", code=1).stdout)
    assert "only safetensors are read" in broken["problem"]


@pytest.mark.slow
def test_what_is_wrong_is_one_line(tmp_path):
    line = "from sailyard.cli import app; app()"
    arguments = ("model", "convert", str(tmp_path / "none"), "new", "--to", "native")
    child = subprocess.run(
        [sys.executable, "-c", line, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert child.returncode == 1
    assert "holds no config.json" in child.stderr
    assert "Traceback" not in child.stderr
