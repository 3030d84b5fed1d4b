"""``sailyard setup`` against a real S3 server, and servers that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from sailyard.artifacts.s3 import S3Store
from sailyard.settings import Settings
from tests.s3 import S3Server


def setup(settings: Settings, *flags: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sailyard", "setup", *flags],
        env={**os.environ, **settings.environment(), **more},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_it_makes_the_bucket_once(s3_server: S3Server, tmp_path: Path) -> None:
    known = s3_server.settings(tmp_path / "home", "x")
    settings = known.model_copy(update={"store": f"s3://fresh-{uuid.uuid4().hex[:12]}/here"})
    assert setup(settings).returncode == 0
    assert S3Store(settings).create_bucket() is False, "it is there"
    assert setup(settings).returncode == 0
    S3Store(settings).client.remove_bucket(S3Store(settings).bucket)


@pytest.mark.slow
def test_a_server_that_never_comes_is_told_without_its_password(settings: Settings) -> None:
    url = "postgresql://yard:hunter2hunter2@127.0.0.1:9/yard"
    ended = setup(settings, "--wait", "1", SAILYARD_DATABASE_URL=url)
    assert ended.returncode == 1
    assert "waiting: cannot open the lineage database" in ended.stdout
    assert "hunter2" not in ended.stdout + ended.stderr
