"""What only a network brings: lost connections, uploads in parts, buckets and keys."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import threading
import uuid
from pathlib import Path

import pytest

from sailyard.artifacts import (
    ArtifactNotFound,
    ArtifactStore,
    S3Store,
    StoreError,
    StoreUnavailable,
    open_artifacts,
)
from sailyard.artifacts.s3 import ConditionalMinio
from sailyard.settings import Settings
from tests.s3 import S3Server
from tests.sailyard.processes import in_children
from tests.sailyard.proxy import Proxy


@pytest.fixture
def s3_store(s3_settings: Settings) -> S3Store:
    return S3Store(s3_settings)


@pytest.mark.slow
def test_big_file_goes_up_in_parts_and_memory_stays_bounded(
    s3_settings: Settings, tmp_path: Path
) -> None:
    size = 96 << 20
    big = tmp_path / "big"
    big.mkdir()
    with (big / "weights.bin").open("wb") as file:
        block = os.urandom(1 << 20)
        for i in range(size >> 20):
            file.write(i.to_bytes(4, "big") + block[4:])
    digest = hashlib.sha256((big / "weights.bin").read_bytes()).hexdigest()

    def publish_and_fetch(_: int) -> None:
        # Memory of a page mapped before the fork does not count: the limit is on what is added.
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (88 << 20), resource.RLIM_INFINITY))
        threading.stack_size(1 << 20)
        artifacts = open_artifacts(s3_settings)
        artifact = artifacts.publish(big, "checkpoint")
        assert artifact.files[0].sha256 == digest
        artifacts.fetch(artifact.digest)

    assert in_children(1, publish_and_fetch) == [0]


def test_upload_in_parts_killed_in_between_is_invisible(
    s3_settings: Settings, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(40 << 20))

    def die_at_the_second_part(_: int) -> None:
        store = S3Store(s3_settings)
        send, sent = store.client._upload_part, 0

        def counted(*args: object) -> str:
            nonlocal sent
            sent += 1
            if sent == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return send(*args)  # type: ignore[arg-type]

        store.client._upload_part = counted  # type: ignore[method-assign, assignment]
        store.put("big", file)

    assert in_children(1, die_at_the_second_part) == [signal.SIGKILL]
    store = S3Store(s3_settings)
    assert store.size("big") is None
    assert store.list() == []
    assert store.put("big", file)
    assert store.size("big") == 40 << 20


def test_missing_bucket_and_wrong_keys_say_what_to_do(s3_settings: Settings) -> None:
    elsewhere = s3_settings.model_copy(update={"store": f"s3://missing-{uuid.uuid4().hex}/x"})
    with pytest.raises(StoreError, match="does not exist: create it"):
        S3Store(elsewhere).list()
    wrong = Settings(
        store=s3_settings.store,
        s3_endpoint=s3_settings.s3_endpoint,
        s3_access_key=s3_settings.s3_access_key,
        s3_secret_key="wrong",
        s3_secure=False,
    )
    with pytest.raises(StoreError, match=r"refused the keys .*SAILYARD_S3_SECRET_KEY") as raised:
        S3Store(wrong).get("key")
    assert "wrong" not in str(raised.value)
    assert S3Store(s3_settings).create_bucket() is False


def test_conditional_put_of_a_huge_object_is_refused(s3_store: S3Store, tmp_path: Path) -> None:
    file = tmp_path / "file"
    with file.open("wb") as sink:
        sink.truncate((16 << 20) + 1)
    with pytest.raises(StoreError, match="at most 16777216 bytes"):
        s3_store.put("key", file, if_absent=True)


# --- lost connections ----------------------------------------------------------------------------


@pytest.fixture
def content(tmp_path: Path) -> Path:
    folder = tmp_path / "content"
    folder.mkdir()
    (folder / "a.txt").write_text("alpha")
    (folder / "weights.bin").write_bytes(os.urandom(3_000_000))
    return folder


def through(proxy: Proxy, settings: Settings) -> Settings:
    return settings.model_copy(update={"s3_endpoint": proxy.endpoint})


def test_download_goes_on_where_the_connection_broke(
    s3_server: S3Server, s3_settings: Settings, content: Path, tmp_path: Path
) -> None:
    data = (content / "weights.bin").read_bytes()
    S3Store(s3_settings).put("weights", data)
    with Proxy(s3_server.endpoint) as proxy:
        proxy.cut_downloads = [1_000_000, 1_200_000]
        store = S3Store(through(proxy, s3_settings))
        assert store.download("weights", tmp_path / "copy") == hashlib.sha256(data).hexdigest()
        assert proxy.num_connections == 3
        proxy.cut_downloads = [0, 500_000]
        assert S3Store(through(proxy, s3_settings)).get("weights") == data


def test_upload_is_repeated_when_the_connection_breaks(
    s3_server: S3Server, s3_settings: Settings, content: Path
) -> None:
    with Proxy(s3_server.endpoint) as proxy:
        proxy.cut_uploads = [1_000_000]
        artifacts = open_artifacts(through(proxy, s3_settings))
        digest = artifacts.publish(content, "dataset").digest
        assert proxy.num_connections > 1
    assert open_artifacts(s3_settings).fetch(digest).is_dir()


def test_server_lost_in_mid_publish_is_a_clear_error_and_a_later_run_continues(
    s3_server: S3Server, s3_settings: Settings, content: Path
) -> None:
    reference = s3_settings.model_copy(update={"store": f"file://{s3_settings.home}/reference"})
    expected = open_artifacts(reference).publish(content, "dataset").digest
    with Proxy(s3_server.endpoint) as proxy:
        store = S3Store(through(proxy, s3_settings), retries=1)
        artifacts = ArtifactStore(store, s3_settings.home / "cache")
        put = store.put

        def lose_the_server(key: str, *args: object, **kwargs: object) -> bool:
            if key.endswith("manifest.json"):
                proxy.close()
            return put(key, *args, **kwargs)  # type: ignore[arg-type]

        store.put = lose_the_server  # type: ignore[method-assign]
        with pytest.raises(StoreUnavailable, match=r"no answer from .*manifest\.json") as raised:
            artifacts.publish(content, "dataset")
        assert proxy.endpoint in str(raised.value)
        assert s3_server.secret_key not in str(raised.value)
    artifacts = open_artifacts(s3_settings)
    with pytest.raises(ArtifactNotFound):
        artifacts.get(expected)
    assert artifacts.publish(content, "dataset").digest == expected
    assert artifacts.fetch(expected).is_dir()


def test_conditional_put_whose_answer_was_lost_counts_as_written(
    s3_server: S3Server, s3_settings: Settings
) -> None:
    """The server wrote it, the answer never came, the repeat meets our own object."""
    with Proxy(s3_server.endpoint) as proxy:
        proxy.swallow_answers = 1
        store = S3Store(through(proxy, s3_settings))
        assert store.put("claim", b"mine", if_absent=True) is True
        assert store.put("claim", b"other", if_absent=True) is False
        proxy.swallow_answers = 1
        assert store.put("claim", b"other", if_absent=True) is False
    assert S3Store(s3_settings).get("claim") == b"mine"


def test_the_condition_reaches_the_wire_as_a_plain_header(
    s3_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pins the private call of the minio client that put_if_absent builds on."""
    client = S3Store(s3_settings).client
    assert isinstance(client, ConditionalMinio)
    seen = {}
    real = client._http.urlopen

    def watch(method: str, url: str, **kwargs: object) -> object:
        seen.update({name.lower(): value for name, value in dict(kwargs["headers"]).items()})  # type: ignore[call-overload]
        return real(method, url, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(client._http, "urlopen", watch)
    client.put_if_absent(S3Store(s3_settings).bucket, f"{uuid.uuid4().hex}/x", b"x")
    assert seen["if-none-match"] == "*"
    assert not any("meta" in name for name in seen)
