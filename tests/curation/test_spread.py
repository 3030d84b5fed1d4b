"""Map steps over a real Ray cluster on this machine: the same results as in this process."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from curation import caption2, rl_data, think_fusion
from curation.spread import Batch, Batches, Input, NoRoom, WorkerLost, spread
from sailyard.artifacts import ArtifactStore
from sailyard.samples import SampleReader
from sailyard.stage import StageContext, local_context
from sailyard.yard import Yard
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
        "instruction": write(root / "instruction", pool(20, seed=4, skills=("shape",))),
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


class Ids:
    """Works on batches of samples, says where, and meets with accidents when told to."""

    def __init__(self, die_at: int = -1, refuse_at: int = -1, notes: Path | None = None) -> None:
        self.die_at, self.refuse_at, self.notes = die_at, refuse_at, notes

    def __call__(self, batch: Batch) -> tuple[int, list[str]]:
        if batch.start == self.refuse_at:
            raise ValueError(f"sample {batch.samples[0].id} is beyond me")
        if batch.start == self.die_at and not (self.notes and self.notes.exists()):
            if self.notes:
                self.notes.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
        return os.getpid(), [sample.id for sample in batch.samples]


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
    inputs: dict[str, Path], cluster: None
) -> None:
    results = spread(batches(inputs), partial(Ids, die_at=6))
    assert [len(next(results)[1]) for _ in range(2)] == [3, 3]
    with pytest.raises(WorkerLost, match="item 2 of 24 was tried 4 times"):
        next(results)


@pytest.mark.slow
def test_an_error_of_a_worker_is_told_as_here(inputs: dict[str, Path], cluster: None) -> None:
    with pytest.raises(ValueError, match="sample cap-00039 is beyond me"):
        list(spread(batches(inputs), partial(Ids, refuse_at=30)))


@pytest.mark.slow
def test_whoever_has_enough_ends_all_work(inputs: dict[str, Path], cluster: None) -> None:
    results = spread(batches(inputs), Ids)
    first = next(results)
    results.close()
    deadline = time.monotonic() + 30
    while _alive(first[0]):
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_cluster_that_is_too_small_is_told(
    inputs: dict[str, Path], cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAILYARD_RAY_WORKERS", "3")
    with pytest.raises(NoRoom, match="RAY_WORKERS is 3, but the Ray cluster auto has 2 CPUs"):
        next(spread(batches(inputs), Ids))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["curation.caption2", "curation.rl_data", "curation.think_fusion"])
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
        "curation.think_fusion.num_samples=12",
    )
    if stage == "curation.caption2":
        given = {"captions": inputs["captions"], "judges": _judges(inputs)}
        entry = caption2.run
    elif stage == "curation.rl_data":
        given = {name: inputs[name] for name in ("checkpoint", "rl_pool")}
        entry = rl_data.run
    else:
        given = {name: inputs[name] for name in ("checkpoint", "instruction")}
        given["prompts"] = inputs["rl_pool"]
        entry = think_fusion.run
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
