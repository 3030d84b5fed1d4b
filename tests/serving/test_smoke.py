"""The smoke stage against a real registry, store and server process; and the server's own flags."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from sailyard.media import encode_png
from sailyard.recipe import load_recipe
from sailyard.samples import Sample, write_samples
from sailyard.stage import StageContext, local_context
from sailyard.yard import Yard
from serving import smoke
from serving.probe import SmokeFailed, parts_of, server, wait_until_ready
from tests.serving.conftest import BLUE, RED, http, wait_until

COLOUR = "<image>\nWhich colour?"


def heldout(directory: Path) -> Path:
    def question(name: str, skill: str, text: str, answer: str, *images: object) -> Sample:
        return Sample(
            id=name,
            source="microworld",
            task=skill,
            messages=[{"role": "user", "content": text}],
            images=[encode_png(image) for image in images],
            meta={"skill": skill, "answer": answer, "check": "exact"},
        )

    write_samples(
        directory,
        [
            question("colour-0", "colour", COLOUR, "red", RED),
            question("colour-1", "colour", COLOUR, "blue", BLUE),
            question("colour-2", "colour", COLOUR, "never asked", BLUE),
            question("sum-0", "sum", "5 + 7?", "12"),
        ],
    )
    return directory


@pytest.fixture
def yard(isolated_home: Path, monkeypatch: pytest.MonkeyPatch) -> Yard:
    monkeypatch.setenv("SAILYARD_SERVE_THREADS", "1")
    return Yard()


def context(
    tmp_path: Path, yard: Yard, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> StageContext:
    promotion = tmp_path / "promotion"
    promotion.mkdir()
    body = {"alias": "production", "name": "tiny", "checkpoint": checkpoint, "promoted": True}
    (promotion / "promotion.json").write_text(json.dumps(body))
    ctx = local_context(
        tmp_path / "stage",
        load_recipe("tiny"),
        "deployment.smoke_test",
        {"promotion": promotion, "version": promotion, "heldout": heldout(tmp_path / "heldout")},
    )
    monkeypatch.setattr(StageContext, "registry", yard.registry)
    monkeypatch.setattr(StageContext, "artifacts", yard.artifacts)
    return ctx


@pytest.mark.slow
def test_smoke_stage(
    checkpoints: dict[str, Path], tmp_path: Path, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = yard.artifacts.publish(checkpoints["first"], "checkpoint").digest
    yard.registry.register("tiny", digest)
    ctx = context(tmp_path, yard, digest, monkeypatch)
    not_promoted, flags = smoke.target_of(ctx, "production", digest)
    assert not not_promoted
    assert flags == ["--checkpoint", str(yard.artifacts.fetch(digest))]
    yard.registry.promote("production", "tiny:1")
    smoke.run(ctx)
    found = ctx.summary_values
    assert found["served"] == "alias production"
    assert found["checkpoint"] == digest
    assert found["correct"] == {"whole": 1.0, "streamed": 1.0, "thinking": 1.0}
    assert found["reasoned"] == 1.0
    assert found["latency_seconds"]["whole"]["requests"] == 3
    assert found["first_token_seconds"] > 0
    assert found["concurrent"]["requests"] == 16
    answers = json.loads((ctx.output("answers") / "answers.json").read_text())
    assert [a["content"] for a in answers if a["kind"] == "whole"] == ["red", "blue", "12"]
    assert not any("seconds" in key for answer in answers for key in answer)


@pytest.mark.slow
def test_promoting_is_seen_by_a_running_process(
    checkpoints: dict[str, Path], tmp_path: Path, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAILYARD_SERVE_POLL_SECONDS", "0.1")
    for name in ("first", "second"):
        yard.registry.register(
            "tiny", yard.artifacts.publish(checkpoints[name], "checkpoint").digest
        )
    yard.registry.promote("production", "tiny:1")
    with server(["--alias", "production"], tmp_path / "log") as url:
        assert wait_until_ready(url)["model"] == "tiny:1"
        yard.registry.promote("production", "tiny:2")
        wait_until(lambda: wait_until_ready(url)["model"] == "tiny:2", "the promotion is not seen")
        yard.registry.rollback("production", reason="test")
        assert http.post(f"{url}/admin/reload").json()["model"] == "tiny:1"


@pytest.mark.slow
def test_server_ends_with_its_parent(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    script = (
        "import sys, os, time\nfrom pathlib import Path\nfrom serving.probe import server\n"
        f"with server(['--checkpoint', {str(checkpoints['first'])!r}], Path(sys.argv[1])) as url:\n"
        "    print(url, flush=True)\n    time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    url = parent.stdout.readline().strip()
    wait_until_ready(url)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()

    def gone() -> bool:
        try:
            http.get(f"{url}/health")
        except httpx.TransportError:
            return True
        return False

    wait_until(gone, "the server outlived its parent")


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(SmokeFailed, match=r"(?s)did not start.*holds no config"),
        server(["--checkpoint", str(tmp_path)], tmp_path / "log"),
    ):
        pass


def test_parts_keep_the_order_of_frames() -> None:
    sample = Sample(
        id="clip",
        source="video",
        task="motion",
        messages=[{"role": "user", "content": "Frame-1: <image>\nFrame-2: <image>\nWhere to?"}],
        images=[encode_png(RED), encode_png(BLUE)],
        is_video=True,
    )
    parts = parts_of(sample)
    assert [part["type"] for part in parts] == ["text", "image_url"] * 2 + ["text"]
    assert [part.get("text") for part in parts][::2] == ["Frame-1: ", "Frame-2: ", "Where to?"]
