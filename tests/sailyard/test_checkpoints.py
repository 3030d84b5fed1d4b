"""Checkpoints inside a stage: only a whole one is ever found, and the last two are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from sailyard.artifacts import LocalStore, ObjectStore
from sailyard.stage import Checkpoints, StageError


def save_step(checkpoints: Checkpoints, folder: Path, step: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "part").mkdir(exist_ok=True)
    (folder / "part" / "state.txt").write_text(f"state {step}")
    checkpoints.save(step, folder)


def load_step(checkpoints: Checkpoints) -> tuple[int, str]:
    latest = checkpoints.latest()
    assert latest is not None
    return latest[0], (latest[1] / "part" / "state.txt").read_text()


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return LocalStore(tmp_path / "store")


def test_checkpoints_keep_the_last_two(store: ObjectStore, tmp_path: Path) -> None:
    checkpoints = Checkpoints(store, "k", tmp_path / "resume")
    assert checkpoints.latest() is None
    for step in (5, 10, 15):
        save_step(checkpoints, tmp_path / "save", step)
    assert load_step(checkpoints) == (15, "state 15")
    assert len(store.list("checkpoints/k/")) == 4
    assert Checkpoints(store, "other", tmp_path / "r2").latest() is None
    checkpoints.clear()
    assert store.list("checkpoints/") == []


def test_a_checkpoint_without_a_pointer_does_not_exist(store: ObjectStore, tmp_path: Path) -> None:
    checkpoints = Checkpoints(store, "k", tmp_path / "resume")
    save_step(checkpoints, tmp_path / "save", 5)
    save_step(checkpoints, tmp_path / "save", 10)
    store.delete("checkpoints/k/000000000010.json")  # as if killed before the last write
    assert load_step(checkpoints) == (5, "state 5")
    save_step(checkpoints, tmp_path / "save", 10)
    assert load_step(checkpoints) == (10, "state 10")
    assert len(store.list("checkpoints/k/")) == 4  # the remains are gone


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    store: ObjectStore, tmp_path: Path
) -> None:
    checkpoints = Checkpoints(store, "k", tmp_path / "resume")
    save_step(checkpoints, tmp_path / "save", 5)
    save_step(checkpoints, tmp_path / "save", 10)
    data = store.read_json("checkpoints/k/000000000010.json")["data"]
    store.put(f"{data}part/state.txt", b"state 1O")
    assert load_step(checkpoints) == (5, "state 5")


def test_the_resume_point_does_not_move(store: ObjectStore, tmp_path: Path) -> None:
    save_step(Checkpoints(store, "k", tmp_path / "first"), tmp_path / "save", 5)
    checkpoints = Checkpoints(store, "k", tmp_path / "resume")
    point = checkpoints.resume_point
    assert point is not None
    assert point[0] == 5
    save_step(checkpoints, tmp_path / "save", 10)
    store.delete("checkpoints/k/000000000005.json")
    assert checkpoints.resume_point == point
    assert (point[1] / "part" / "state.txt").read_text() == "state 5"


def test_a_checkpoint_is_free_of_its_folder(store: ObjectStore, tmp_path: Path) -> None:
    checkpoints = Checkpoints(store, "k", tmp_path / "resume")
    save_step(checkpoints, tmp_path / "save", 5)
    (tmp_path / "save" / "part" / "state.txt").write_text("changed")
    assert load_step(checkpoints) == (5, "state 5")
    with pytest.raises(StageError, match="is empty"):
        checkpoints.save(6, tmp_path / "nothing")
    with pytest.raises(StageError, match="at least 0"):
        checkpoints.save(-1, tmp_path / "save")
