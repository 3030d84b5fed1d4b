"""What every test shares: no test reads or writes the state of a real yard."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def isolated_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point SAILYARD_HOME at a temporary folder and drop every other SAILYARD_ variable."""
    for name in [name for name in os.environ if name.startswith("SAILYARD_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    monkeypatch.setenv("SAILYARD_HOME", str(home))
    return home
