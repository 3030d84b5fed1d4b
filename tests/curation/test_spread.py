"""Map steps over a real Ray cluster on this machine: the same results as in this process."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from curation import caption2, rl_data
from curation.spread import Batch, Batches, Input, NoRoom, WorkerLost, spread
from sailyard.artifacts import ArtifactStore
from sailyard.samples import SampleReader
from sailyard.stage import StageContext, local_context
from sailyard.stage.errors import EXIT_RESUME
from sailyard.yard import Yard
from tests.curation.spread_workers import Ids, broken
from tests.evaluation.tiny import captions, micro_recipe, pool, save_tiny, write
from training import judges

ray = pytest.importorskip("ray", reason="pip install 'sailyard[train]'")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the stages read."""
    torch.set_num_threads(1)  # as Ray's workers: the last bits depend on it
    root = tmp_path_factory.mktemp("spread")
    return {
        "checkpoint": save_tiny(root / "checkpoint"),
        "captions": write(root / "captions", captions(70)),
        "rl_pool": write(root / "pool", pool(8, skills=("sum", "colour"))),
    }


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cluster of two CPUs for all tests: it takes seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # Ray keeps a token there
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture
def cluster(started: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAILYARD_RAY_ADDRESS", "auto")
    monkeypatch.setenv("SAILYARD_RAY_WORKERS", "2")


def batches(inputs: dict[str, Path], size: int = 3) -> Batches:
    reader = SampleReader(inputs["captions"])
    return Batches(reader, range(len(reader) - 1, -1, -1), size)


def test_batches_are_cut_once_and_read_when_asked_for(inputs: dict[str, Path]) -> None:
    cut = batches(inputs, 32)
    assert [len(batch.samples) for batch in cut] == [32, 32, 6]
    assert [batch.start for batch in cut] == [0, 32, 64]
    assert cut[2].positions[-1] == 0
    with pytest.raises(IndexError):
        cut[3]


def test_without_a_cluster_one_worker_works_here(inputs: dict[str, Path]) -> None:
    made = []

    def make() -> Callable[[Batch], int]:
        made.append(1)
        return lambda batch: batch.start

    assert list(spread(batches(inputs, 32), make)) == [0, 32, 64]
    assert list(spread(Batches(SampleReader(inputs["captions"]), [], 3), make)) == []
    assert len(made) == 1


def test_an_input_is_found_by_path_or_by_digest(tmp_path: Path) -> None:
    """On another node of a cluster the path does not exist."""
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    yard = Yard()
    assert isinstance(yard.artifacts, ArtifactStore)
    digest = yard.artifacts.publish(folder, "a/b").digest
    assert Input(folder, digest).folder() == folder
    fetched = Input(tmp_path / "elsewhere", digest).folder()
    assert (fetched / "config.json").read_text() == "{}"


@pytest.mark.slow
def test_a_lost_worker_is_replaced_and_nothing_is_lost_or_doubled(
    inputs: dict[str, Path], tmp_path: Path, cluster: None
) -> None:
    cut = batches(inputs)
    note = tmp_path / "died"
    found = list(spread(cut, partial(Ids, die_at=36, notes=note)))
    assert note.exists()
    assert [ids for _, ids in found] == [[s.id for s in batch.samples] for batch in cut]
    assert len({pid for pid, _ in found}) == 3


@pytest.mark.slow
def test_what_ends_every_worker_is_an_error_in_the_end(
    inputs: dict[str, Path], cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curation.spread.RETRIES", 1)  # a new worker takes seconds
    results = spread(batches(inputs), partial(Ids, die_at=6))
    assert [len(next(results)[1]) for _ in range(2)] == [3, 3]
    with pytest.raises(WorkerLost, match="item 2 of 24 was tried 2 times"):
        next(results)


@pytest.mark.slow
def test_an_error_of_a_worker_is_told_as_here(inputs: dict[str, Path], cluster: None) -> None:
    with pytest.raises(ValueError, match=r"^sample cap-00039 is beyond me$"):
        list(spread(batches(inputs), partial(Ids, refuse_at=30)))
    with pytest.raises(ValueError, match=r"^no judges here$"):
        list(spread(batches(inputs), broken))


@pytest.mark.slow
def test_whoever_has_enough_ends_all_work(inputs: dict[str, Path], cluster: None) -> None:
    results = spread(batches(inputs), Ids)
    first = next(results)
    results.close()
    _wait_for_the_end(first[0])


def _wait_for_the_end(worker: int) -> None:
    deadline = time.monotonic() + 120
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_cluster_that_is_too_small_is_told(
    inputs: dict[str, Path], cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAILYARD_RAY_WORKERS", "3")
    with pytest.raises(NoRoom, match="RAY_WORKERS is 3, but the Ray cluster auto has 2 CPUs"):
        next(spread(batches(inputs), Ids))


@pytest.mark.slow
def test_a_stop_ends_the_stage_and_the_cluster_that_it_started(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    """Ray takes SIGTERM for itself when it starts: the stage must have it back."""
    command = [sys.executable, "-m", "tests.curation.spread_workers", str(inputs["captions"])]
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "SAILYARD_RAY_ADDRESS": "local",
        "SAILYARD_RAY_WORKERS": "1",
    }
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as stage:
        assert stage.stdout is not None
        worker = int(next(line for line in stage.stdout if line.strip().isdigit()))
        stage.send_signal(signal.SIGTERM)
        assert stage.wait(300) == EXIT_RESUME
    _wait_for_the_end(worker)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["curation.caption2", "curation.rl_data"])
def test_stages_write_the_same_bytes(
    stage: str,
    inputs: dict[str, Path],
    tmp_path: Path,
    cluster: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    over_ray = _run(stage, inputs, tmp_path / "ray")
    monkeypatch.delenv("SAILYARD_RAY_ADDRESS")
    here = _run(stage, inputs, tmp_path / "here")
    assert _digests(over_ray) == _digests(here)
    assert over_ray.summary_values == here.summary_values


def _run(stage: str, inputs: dict[str, Path], folder: Path) -> StageContext:
    recipe = micro_recipe(
        "curation.caption2.batch_size=16",
        "curation.caption2.min_score=2",
        "curation.rl_data.num_prompts=5",
    )
    if stage == "curation.caption2":
        given = {"captions": inputs["captions"], "judges": _judges(inputs)}
        entry = caption2.run
    else:
        given = {name: inputs[name] for name in ("checkpoint", "rl_pool")}
        entry = rl_data.run
    ctx = local_context(folder, recipe, stage, given)
    entry(ctx)
    return ctx


def _judges(inputs: dict[str, Path]) -> Path:
    """Judges that know nothing: a random network with the judges' prompts beside it."""
    folder = inputs["checkpoint"]
    if not (folder / judges.JUDGES_FILE).exists():
        (folder / judges.JUDGES_FILE).write_text(json.dumps({"judges": judges.JUDGES}))
    return folder


def _digests(ctx: StageContext) -> dict[str, str]:
    return {
        f"{name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for name in ctx.stage.outputs
        for path in sorted(ctx.output(name).iterdir())
    }
