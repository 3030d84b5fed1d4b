"""Datasets read out of a store: in bounds, verified, through lost connections, nothing twice."""

from __future__ import annotations

import hashlib
import os
import time
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import pytest

from sailyard.artifacts import ArtifactCorrupt, ArtifactStore, open_artifacts, open_store
from sailyard.artifacts.cache import FileCache
from sailyard.samples import Sample, SampleReader, count_samples, read_samples, write_samples
from sailyard.settings import Settings
from tests.s3 import S3Server
from tests.sailyard.processes import in_children
from tests.sailyard.proxy import Proxy

NUM, SHARD = 60, 10


@pytest.fixture
def samples() -> list[Sample]:
    """Six shards of about 200 kB."""
    return [
        Sample(
            id=f"s{i}",
            source="test",
            task="count",
            messages=[
                {"role": "user", "content": "<image>\nHow many?"},
                {"role": "assistant", "content": str(i)},
            ],
            images=[os.urandom(20_000)],
        )
        for i in range(NUM)
    ]


@pytest.fixture
def dataset(samples: list[Sample], tmp_path: Path) -> Path:
    write_samples(tmp_path / "data", samples, shard_size=SHARD)
    return tmp_path / "data"


def size_of_shard(dataset: Path) -> int:
    return max(path.stat().st_size for path in dataset.glob("*.parquet"))


def cached(settings: Settings) -> list[Path]:
    folder = settings.home / "cache" / "artifacts" / "streamed"
    return [path for path in folder.glob("*") if not path.name.startswith(".")]


@pytest.mark.parametrize("kind", ["settings", "s3_settings"])
def test_any_sample_is_read_from_either_store(
    kind: str, request: pytest.FixtureRequest, dataset: Path, samples: list[Sample]
) -> None:
    artifacts = open_artifacts(request.getfixturevalue(kind))
    stream = artifacts.stream(artifacts.publish(dataset, "data").digest)
    assert count_samples(stream) == NUM
    assert list(read_samples(stream)) == samples
    reader = SampleReader(stream)
    assert [reader[i * 7 % NUM] for i in range(NUM)] == [samples[i * 7 % NUM] for i in range(NUM)]
    reader.close()
    with pytest.raises(FileNotFoundError, match="has no file other"):
        stream("other")


def test_a_local_store_is_read_in_place(settings: Settings, dataset: Path) -> None:
    artifacts = open_artifacts(settings)
    assert len(list(read_samples(artifacts.stream(artifacts.publish(dataset, "d").digest)))) == NUM
    assert cached(settings) == []


def test_the_cache_holds_no_more_than_it_may(
    s3_settings: Settings, dataset: Path, samples: list[Sample]
) -> None:
    limit = 3 * size_of_shard(dataset)
    settings = s3_settings.model_copy(update={"stream_bytes": limit})
    artifacts = open_artifacts(settings)
    stream = artifacts.stream(artifacts.publish(dataset, "data").digest)
    for i, sample in enumerate(read_samples(stream)):
        assert sample == samples[i]
        assert sum(path.stat().st_size for path in cached(settings)) <= limit
    # What was read last is still there.
    newest = {file.name: file.sha256 for file in stream.artifact.files}["part-00005.parquet"]
    assert newest in {path.name for path in cached(settings)}


def test_a_shard_that_another_process_reads_stays(tmp_path: Path) -> None:
    contents = [bytes([n]) * 1000 for n in range(4)]
    data = {hashlib.sha256(content).hexdigest(): content for content in contents}
    first, *others = data
    cache = FileCache(tmp_path / "cache", limit_bytes=2000)

    def opened(name: str) -> BufferedReader:
        def bring(path: Path) -> None:
            path.write_bytes(data[name])

        return cache.open(name, 1000, bring)

    held = opened(first)

    def crowd_it_out(_: int) -> None:
        for name in others:
            opened(name).close()
        assert (cache.folder / first).exists()
        assert sum(path.is_file() for path in cache.folder.iterdir()) == 2

    assert in_children(1, crowd_it_out) == [0]
    held.close()
    opened(others[0]).close()
    assert not (cache.folder / first).exists()


def test_processes_that_want_the_same_shard_fetch_it_once(tmp_path: Path) -> None:
    content = b"x" * 1000
    sha256 = hashlib.sha256(content).hexdigest()
    fetches = tmp_path / "fetches"

    def want_it(_: int) -> None:
        def bring(path: Path) -> None:
            with fetches.open("ab") as log:
                log.write(b".")
            time.sleep(0.1)
            path.write_bytes(content)

        with FileCache(tmp_path / "cache", 1 << 20).open(sha256, len(content), bring) as handle:
            assert handle.read() == content

    assert in_children(4, want_it) == [0] * 4
    assert fetches.read_bytes() == b"."


def test_a_damaged_copy_is_fetched_anew_and_a_damaged_object_is_named(
    s3_settings: Settings, dataset: Path
) -> None:
    artifacts = open_artifacts(s3_settings)
    stream = artifacts.stream(artifacts.publish(dataset, "data").digest)
    good = stream("part-00001.parquet").read()
    file = {file.name: file for file in stream.artifact.files}["part-00001.parquet"]
    copy = s3_settings.home / "cache" / "artifacts" / "streamed" / file.sha256
    copy.chmod(0o644)
    copy.write_bytes(good[:-1] + b"?")
    assert stream("part-00001.parquet").read() == good
    copy.unlink()
    key = f"objects/sha256/{file.sha256[:2]}/{file.sha256}"
    open_store(s3_settings).put(key, good[:-1] + b"?")
    with pytest.raises(ArtifactCorrupt, match=r"part-00001\.parquet is damaged"):
        stream("part-00001.parquet")


def test_lost_connections_lose_and_double_no_sample(
    s3_server: S3Server, s3_settings: Settings, dataset: Path, samples: list[Sample]
) -> None:
    digest = open_artifacts(s3_settings).publish(dataset, "data").digest
    with Proxy(s3_server.endpoint) as proxy:
        store = open_store(s3_settings.model_copy(update={"s3_endpoint": proxy.endpoint}))
        artifacts = ArtifactStore(store, s3_settings.home / "cache-behind-proxy")
        reader = SampleReader(artifacts.stream(digest))
        size = size_of_shard(dataset)
        proxy.cut_downloads = [size // 2, size // 3, size // 5, size // 2, size // 7]
        reader.prepare([0, 1, 2])
        assert [reader[i] for i in range(NUM)] == samples
        # New connections are cut; how many are made is the client's pool's business.
        assert len(proxy.cut_downloads) < 5
        reader.close()


def test_a_store_that_was_away_while_shards_were_prepared_is_asked_again(
    s3_server: S3Server, s3_settings: Settings, dataset: Path, samples: list[Sample]
) -> None:
    artifacts = open_artifacts(s3_settings)
    stream = artifacts.stream(artifacts.publish(dataset, "data").digest)
    away = True

    def open_file(name: str) -> BinaryIO:
        if away and name.startswith("part"):
            raise ConnectionError("the store is away")
        return stream(name)

    reader = SampleReader(open_file)
    reader.prepare([0, 1])
    with pytest.raises(ConnectionError):
        reader[0]
    away = False
    assert reader[0] == samples[0]
    reader.close()
