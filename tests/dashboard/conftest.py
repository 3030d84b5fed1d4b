"""One seeded yard for all pages; tests that change it take a copy."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from sailyard.settings import Settings
from sailyard.yard import Yard
from tests.dashboard.seed import seed


@dataclass(frozen=True)
class Seeded:
    """A seeded yard: its home, its finished run and its failed one."""

    home: Path
    finished: str
    failed: str


@pytest.fixture(scope="session")
def _original(tmp_path_factory: pytest.TempPathFactory) -> Seeded:
    root = tmp_path_factory.mktemp("board")
    yard = Yard(Settings(home=root / "home"))
    finished, failed = seed(yard, root / "outputs")
    yard.database.close()
    return Seeded(root / "home", finished, failed)


@pytest.fixture
def seeded(_original: Seeded, monkeypatch: pytest.MonkeyPatch) -> Seeded:
    """The seeded yard as this process's yard; not to be changed."""
    monkeypatch.setenv("SAILYARD_HOME", str(_original.home))
    return _original


@pytest.fixture
def own(_original: Seeded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Seeded:
    """A copy of it, to be changed."""
    home = tmp_path / "copy"
    shutil.copytree(_original.home, home)
    monkeypatch.setenv("SAILYARD_HOME", str(home))
    return Seeded(home, _original.finished, _original.failed)
