"""Artifacts on a local folder and on a real S3 server: one behaviour, whatever goes wrong."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sailyard.artifacts import (
    ArtifactCorrupt,
    ArtifactError,
    ArtifactNotFound,
    ArtifactStore,
    ContentChanged,
    LocalStore,
    ObjectNotFound,
    ObjectStore,
    StoreError,
    StoreFull,
    open_artifacts,
    open_store,
)
from sailyard.artifacts import objects as objects_module
from sailyard.settings import Settings
from tests.sailyard.processes import in_children


@pytest.fixture(params=["local", "s3"])
def yard(request: pytest.FixtureRequest) -> Settings:
    """Settings of a yard on each kind of store in turn."""
    name = "settings" if request.param == "local" else "s3_settings"
    found: Settings = request.getfixturevalue(name)
    return found


@pytest.fixture
def store(yard: Settings) -> ObjectStore:
    return open_store(yard)


@pytest.fixture
def artifacts(yard: Settings) -> ArtifactStore:
    return open_artifacts(yard)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files, one of them empty, one in a subfolder."""
    root = tmp_path / "content"
    (root / "sub").mkdir(parents=True)
    (root / "a.txt").write_text("alpha")
    (root / "empty").write_bytes(b"")
    (root / "sub" / "weights.bin").write_bytes(os.urandom(300_000))
    return root


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def object_key(path: Path) -> str:
    digest = sha256(path.read_bytes())
    return f"objects/sha256/{digest[:2]}/{digest}"


def overwrite(store: ObjectStore, key: str, data: bytes) -> None:
    """Damage an object in place, as a bad disk would, below the store's own write path."""
    if isinstance(store, LocalStore):
        path = store.root / key
        path.chmod(0o644)
        path.write_bytes(data)
        path.chmod(0o444)
    else:
        store.put(key, data)


def flip_byte(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


# --- objects -------------------------------------------------------------------------------------


def test_put_get_list_delete(store: ObjectStore, tmp_path: Path) -> None:
    assert store.put("runs/1/a.json", b"one")
    assert store.put("runs/10/a.json", b"")
    assert store.put("runs/1/a.json", b"two")
    assert store.get("runs/1/a.json") == b"two"
    assert store.get("runs/10/a.json") == b""
    assert store.size("runs/1/a.json") == 3
    assert store.size("runs/2/a.json") is None
    assert not store.exists("runs")
    assert store.list("runs/1") == ["runs/1/a.json", "runs/10/a.json"]
    assert store.list("runs/1/") == ["runs/1/a.json"]
    assert store.list("nothing/") == []
    assert store.download("runs/1/a.json", tmp_path / "deep" / "file") == sha256(b"two")
    assert (tmp_path / "deep" / "file").read_bytes() == b"two"
    store.delete("runs/1/a.json")
    store.delete("runs/1/a.json")
    with pytest.raises(ObjectNotFound, match=r"runs/1/a\.json"):
        store.get("runs/1/a.json")
    with pytest.raises(ObjectNotFound, match=r"runs/1/a\.json"):
        store.download("runs/1/a.json", tmp_path / "gone")
    assert not (tmp_path / "gone").exists()


def test_json_round_trip_and_error_names_the_key(store: ObjectStore) -> None:
    value = {"b": [1, 2.5, None], "a": "grün"}
    store.write_json("x.json", value)
    assert store.read_json("x.json") == value
    assert store.get("x.json") == '{"a":"grün","b":[1,2.5,null]}'.encode()
    store.put("y.json", b"{")
    with pytest.raises(StoreError, match=r"y\.json is not JSON"):
        store.read_json("y.json")


@pytest.mark.parametrize("key", ["", "/etc/passwd", "a/../b", "a//b", "./a", "a\\b", "a/"])
def test_keys_that_leave_the_store_are_refused(store: ObjectStore, key: str) -> None:
    with pytest.raises(StoreError, match="not a usable key"):
        store.put(key, b"x")


def test_conditional_put_lets_exactly_one_writer_win(store: ObjectStore) -> None:
    bodies = [f"writer {i}".encode() for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda body: store.put("claim", body, if_absent=True), bodies))
    assert won.count(True) == 1
    assert store.get("claim") == bodies[won.index(True)]
    assert store.put("claim", b"late", if_absent=True) is False
    assert store.put("claim", b"forced")
    assert store.get("claim") == b"forced"


def test_put_refuses_bytes_that_are_not_what_was_promised(
    store: ObjectStore, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"changed")
    for data in (file, b"changed", b""):
        with pytest.raises(ContentChanged):
            store.put("object", data, sha256=sha256(b"before"))
    assert not store.exists("object")
    assert store.put("object", file, sha256=sha256(b"changed"))


def test_local_store_sweeps_only_old_leftovers(tmp_path: Path) -> None:
    temporary = tmp_path / "store" / ".tmp"
    temporary.mkdir(parents=True)
    (temporary / "old").write_bytes(b"x")
    (temporary / "new").write_bytes(b"x")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(temporary / "old", (two_days_ago, two_days_ago))
    store = LocalStore(tmp_path / "store")
    assert [path.name for path in temporary.iterdir()] == ["new"]
    assert store.list() == []


# --- artifacts -----------------------------------------------------------------------------------


def test_publish_and_fetch_round_trip(artifacts: ArtifactStore, folder: Path) -> None:
    artifact = artifacts.publish(folder, "dataset", {"rows": 3})
    assert [file.name for file in artifact.files] == ["a.txt", "empty", "sub/weights.bin"]
    assert artifact.size == 300_005
    assert artifacts.get(artifact.digest) == artifact
    fetched = artifacts.fetch(artifact.digest)
    for file in artifact.files:
        assert (fetched / file.name).read_bytes() == (folder / file.name).read_bytes()
        assert (fetched / file.name).stat().st_mode & 0o222 == 0
    assert artifacts.fetch(artifact.digest) == fetched


def test_digest_is_of_content_kind_and_meta_only(
    artifacts: ArtifactStore, folder: Path, tmp_path: Path
) -> None:
    artifact = artifacts.publish(folder, "dataset", {"a": 1, "b": 2})
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    os.utime(copy / "a.txt", (0, 0))
    assert artifacts.publish(copy, "dataset", {"b": 2, "a": 1}) == artifact
    assert artifacts.publish(copy, "checkpoint", {"a": 1, "b": 2}).digest != artifact.digest
    assert artifacts.publish(copy, "dataset").digest != artifact.digest


def test_equal_files_are_stored_once(artifacts: ArtifactStore, folder: Path) -> None:
    artifacts.publish(folder, "dataset")
    (folder / "second.txt").write_text("alpha")
    artifacts.publish(folder, "dataset")
    assert len(artifacts.store.list("objects/")) == 3


def test_what_cannot_be_published_is_named(
    artifacts: ArtifactStore, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="nowhere"):
        artifacts.publish(tmp_path / "nowhere", "dataset")
    (tmp_path / "void").mkdir()
    with pytest.raises(ArtifactError, match="holds no file"):
        artifacts.publish(tmp_path / "void", "dataset")
    with pytest.raises(ArtifactError, match="metadata of a dataset"):
        artifacts.publish(folder, "dataset", {"bad": object()})
    (folder / "loop").symlink_to(folder)
    with pytest.raises(ArtifactError, match="loop is a link"):
        artifacts.publish(folder, "dataset")
    (folder / "loop").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(ArtifactError, match="pipe is neither"):
        artifacts.publish(folder, "dataset")


def test_interrupted_publish_is_invisible_and_can_be_repeated(yard: Settings, folder: Path) -> None:
    """SIGKILL before each write in turn: no pointer, no artifact; then publishing just works."""
    reference = open_artifacts(yard.model_copy(update={"store": f"file://{yard.home}/reference"}))
    digest = reference.publish(folder, "dataset").digest
    num_writes = 5  # three files, manifest, pointer

    for survived in range(num_writes):
        place = yard.model_copy(update={"store": f"{yard.store}/{survived}"})

        def die_after_some_writes(
            _: int, survived: int = survived, place: Settings = place
        ) -> None:
            victim = open_artifacts(place)
            put, done = victim.store.put, 0

            def counted(*args: object, **kwargs: object) -> bool:
                nonlocal done
                if done == survived:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1
                return put(*args, **kwargs)  # type: ignore[arg-type]

            victim.store.put = counted  # type: ignore[method-assign]
            victim.publish(folder, "dataset")

        assert in_children(1, die_after_some_writes) == [signal.SIGKILL]
        reader = open_artifacts(place)
        assert not reader.exists(digest)
        with pytest.raises(ArtifactNotFound, match=digest):
            reader.get(digest)
        with pytest.raises(ArtifactNotFound, match=digest):
            reader.fetch(digest)
        assert reader.publish(folder, "dataset").digest == digest
        assert reader.fetch(digest).is_dir()


def test_two_processes_publishing_the_same_artifact_leave_one(yard: Settings, folder: Path) -> None:
    def publish(_: int) -> None:
        open_artifacts(yard).publish(folder, "dataset", {"rows": 3})

    assert in_children(4, publish) == [0, 0, 0, 0]
    artifacts = open_artifacts(yard)
    assert len(artifacts.store.list("artifacts/")) == 2  # one manifest, one pointer
    assert len(artifacts.store.list("objects/")) == 3
    digest = artifacts.publish(folder, "dataset", {"rows": 3}).digest
    assert len(artifacts.store.list("artifacts/")) == 2

    def fetch(_: int) -> None:
        assert (open_artifacts(yard).fetch(digest) / "a.txt").read_text() == "alpha"

    assert in_children(4, fetch) == [0, 0, 0, 0]
    cached = [path.name for path in (yard.home / "cache" / "artifacts").iterdir()]
    assert cached == [digest]


def test_flipped_byte_is_detected_on_read_and_named(artifacts: ArtifactStore, folder: Path) -> None:
    digest = artifacts.publish(folder, "dataset").digest
    key = object_key(folder / "sub" / "weights.bin")
    overwrite(artifacts.store, key, flip_byte(artifacts.store.get(key)))
    with pytest.raises(ArtifactCorrupt, match=r"sub/weights\.bin is damaged") as raised:
        artifacts.fetch(digest)
    assert key in str(raised.value)
    assert not (artifacts.cache_dir / digest).exists()
    # The way out that the message names.
    artifacts.store.delete(key)
    artifacts.publish(folder, "dataset")
    assert artifacts.fetch(digest).is_dir()


def test_flipped_byte_after_a_first_fetch_is_detected_too(
    artifacts: ArtifactStore, folder: Path
) -> None:
    digest = artifacts.publish(folder, "dataset").digest
    path = artifacts.fetch(digest) / "a.txt"
    path.chmod(0o644)
    path.write_bytes(b"alphb")
    if isinstance(artifacts.store, LocalStore):  # the copy is a link: the store has no other bytes
        with pytest.raises(ArtifactCorrupt, match=r"a\.txt is damaged"):
            artifacts.fetch(digest)
    else:
        assert (artifacts.fetch(digest) / "a.txt").read_text() == "alpha"


def test_stray_file_in_the_cache_is_not_taken_for_content(
    artifacts: ArtifactStore, folder: Path
) -> None:
    digest = artifacts.publish(folder, "dataset").digest
    (artifacts.fetch(digest) / "part-99999.parquet").write_bytes(b"stray")
    assert not (artifacts.fetch(digest) / "part-99999.parquet").exists()


def test_damaged_manifest_and_lost_file_are_named(artifacts: ArtifactStore, folder: Path) -> None:
    digest = artifacts.publish(folder, "dataset").digest
    lost = object_key(folder / "a.txt")
    artifacts.store.delete(lost)
    with pytest.raises(ArtifactCorrupt, match=r"a\.txt is gone"):
        artifacts.fetch(digest)
    key = f"artifacts/{digest}/manifest.json"
    overwrite(artifacts.store, key, flip_byte(artifacts.store.get(key)))
    with pytest.raises(ArtifactCorrupt, match=r"manifest\.json is damaged"):
        artifacts.get(digest)
    artifacts.store.delete(key)
    with pytest.raises(ArtifactCorrupt, match=r"has lost artifacts/"):
        artifacts.get(digest)


def test_file_that_changes_while_it_is_published(
    artifacts: ArtifactStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = objects_module.open_checked
    target = folder / "a.txt"

    def change_then_open(data: bytes | Path, digest: str | None, key: str) -> object:
        if data == target:
            target.write_text("omega")
        return real(data, digest, key)

    for module in ("sailyard.artifacts.local", "sailyard.artifacts.s3"):
        monkeypatch.setattr(f"{module}.open_checked", change_then_open)
    with pytest.raises(ArtifactError, match=r"a\.txt changed while"):
        artifacts.publish(folder, "dataset")
    assert artifacts.store.list("artifacts/") == []


# --- a full disk ---------------------------------------------------------------------------------


def test_full_disk_is_a_clear_error_and_publishes_nothing(settings: Settings, folder: Path) -> None:
    """The kernel itself refuses to write past a limit, in a process of its own."""

    def publish(_: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        with pytest.raises(StoreFull, match=r"no space left .*nothing was published"):
            open_artifacts(settings).publish(folder, "dataset")

    assert in_children(1, publish) == [0]
    artifacts = open_artifacts(settings)
    assert artifacts.store.list("artifacts/") == []
    assert list((settings.home / "store" / ".tmp").iterdir()) == []
    assert artifacts.fetch(artifacts.publish(folder, "dataset").digest).is_dir()


def test_full_disk_while_fetching_leaves_no_half_copy(s3_settings: Settings, folder: Path) -> None:
    digest = open_artifacts(s3_settings).publish(folder, "dataset").digest

    def fetch(_: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        with pytest.raises(StoreFull, match="no space left"):
            open_artifacts(s3_settings).fetch(digest)

    assert in_children(1, fetch) == [0]
    assert list((s3_settings.home / "cache" / "artifacts").iterdir()) == []
    assert open_artifacts(s3_settings).fetch(digest).is_dir()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_really_full_disk(tiny_disk: Path, folder: Path, tmp_path: Path) -> None:
    artifacts = ArtifactStore(LocalStore(tiny_disk / "store"), tmp_path / "cache")
    first = artifacts.publish(folder, "dataset")
    (folder / "large").write_bytes(os.urandom(1_000_000))
    with pytest.raises(StoreFull, match="no space left"):
        artifacts.publish(folder, "dataset")
    assert len(artifacts.store.list("artifacts/")) == 2
    assert artifacts.fetch(first.digest).is_dir()
