"""A server that serves one version for good, and is ready only once that has passed its test."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI
from safetensors.torch import load_file, save_file

from sailyard.yard import Yard
from serving import proof
from serving.probe import SmokeFailed, server
from serving.settings import ServingSettings
from tests.serving.conftest import http, serve
from tests.serving.test_smoke import heldout

pytestmark = pytest.mark.slow


@pytest.fixture
def yard(isolated_home: Path, monkeypatch: pytest.MonkeyPatch) -> Yard:
    monkeypatch.setenv("SAILYARD_SERVE_THREADS", "1")
    monkeypatch.setenv("SAILYARD_SERVE_POLL_SECONDS", "0.2")
    return Yard()


def register(yard: Yard, checkpoint: Path) -> str:
    digest = yard.artifacts.publish(checkpoint, "checkpoint").digest
    yard.registry.register("tiny", digest)
    return digest


@contextmanager
def pinned(log: Path) -> Iterator[str]:
    with server(["--pinned"], log) as url:
        yield url


def status_when(url: str, true: Any) -> dict[str, Any]:
    until = time.monotonic() + 180
    status: dict[str, Any] = {}
    while not (status and true(status)):
        assert time.monotonic() < until, status
        time.sleep(0.1)
        with suppress(httpx.TransportError):  # the address is said before the server listens
            status = http.get(f"{url}/ready").json()
    return status


def test_a_pinned_version_stays_whatever_the_alias_does(
    checkpoints: dict[str, Path], tmp_path: Path, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = register(yard, checkpoints["first"])
    register(yard, checkpoints["second"])
    monkeypatch.setenv("SAILYARD_SERVE_VERSION", digest)
    yard.registry.promote("production", "tiny:2")
    with pinned(tmp_path / "log") as url:
        status = status_when(url, lambda status: status["ready"])
        assert (status["model"], status["digest"], status["error"]) == ("tiny:1", digest, None)
        assert http.get(f"{url}/ready").status_code == 200
        time.sleep(1)
        assert http.get(f"{url}/ready").json()["model"] == "tiny:1"
    assert "passed its smoke test" in (tmp_path / "log").read_text()


def test_without_a_version_it_is_idle_and_says_so(tmp_path: Path, yard: Yard) -> None:
    with pinned(tmp_path / "log") as url:
        status = status_when(url, lambda status: status["ready"])
        assert status["model"] is None
        assert "nothing is promoted" in status["error"]
        refusal = http.post(
            f"{url}/v1/chat/completions",
            json={"model": "production", "messages": [{"role": "user", "content": "hello"}]},
        )
        assert refusal.status_code == 503
        assert "nothing is promoted" in refusal.json()["error"]["message"]


def test_weights_that_are_no_numbers_are_never_ready(
    checkpoints: dict[str, Path], tmp_path: Path, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoints["first"], broken)
    (file,) = broken.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight"))
    tensors[name] = torch.full_like(tensors[name], torch.nan)
    save_file(tensors, file, metadata={"format": "pt"})
    monkeypatch.setenv("SAILYARD_SERVE_VERSION", register(yard, broken))
    with pinned(tmp_path / "log") as url:
        status = status_when(url, lambda status: "finite" in (status["error"] or ""))
        assert not status["ready"]
        assert "mlp.up_proj.weight" in status["error"]
        assert http.get(f"{url}/ready").status_code == 503


def test_a_version_that_fails_its_test_answers_and_is_not_ready(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    from tests.serving.conftest import Yard as OneVersion

    def fail(served: object) -> None:
        raise SmokeFailed("colour-0 streamed gives 'red', whole 'blue'")

    with serve(OneVersion(checkpoints, "first"), prove=fail) as (url, _):
        status = status_when(url, lambda status: status["rejected"])
        assert not status["ready"]
        assert "colour-0" in status["error"]
        assert http.get(f"{url}/health").status_code == 200, "it can tell why"


def test_the_questions_are_the_versions_own(
    checkpoints: dict[str, Path], tmp_path: Path, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = register(yard, checkpoints["first"])
    assert [sample.id for sample in proof.questions(digest, yard)] == ["plain"]
    outputs = {"heldout": yard.artifacts.publish(heldout(tmp_path / "h"), "samples").digest}
    finished = type("Result", (), {"finished": True, "outputs": outputs})
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(
        proof, "stage_result", lambda run, stage, _yard: asked.append((run, stage)) or finished
    )
    second = yard.artifacts.publish(checkpoints["second"], "checkpoint").digest
    yard.registry.register("tiny", second, run_id="run-7")
    assert [s.id for s in proof.questions(second, yard)] == ["colour-0", "sum-0"]
    assert asked == [("run-7", "curation.heldout")]


def test_the_proof_fails_where_stream_and_whole_differ(
    checkpoints: dict[str, Path], yard: Yard, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = register(yard, checkpoints["first"])
    model = OpenAI(base_url=f"{address}/v1", api_key="none").models.list().data[0].id
    served = type("Served", (), {"digest": digest, "name": model})
    proof.prove(address, served, ServingSettings(), yard)
    ask = proof.ask

    def unequal(client: OpenAI, model: str, sample: Any, kind: str) -> Any:
        answer = ask(client, model, sample, kind)
        answer.content += kind
        return answer

    monkeypatch.setattr(proof, "ask", unequal)
    with pytest.raises(SmokeFailed, match="streamed gives"):
        proof.prove(address, served, ServingSettings(), yard)
