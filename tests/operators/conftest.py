"""A stage whose process runs any Python code, in place of ``sailyard stage run``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def stage_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Call it with code: from then on, that code is the interpreter that stages are started by."""

    def stand_in(code: str) -> None:
        script = tmp_path / "interpreter"
        script.write_text(f"#!{sys.executable}\n{code}\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return stand_in
