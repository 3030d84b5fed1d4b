"""Settings: environment in, absolute places out, no secret in sight."""

from __future__ import annotations

from pathlib import Path

import pytest

from sailyard.artifacts import LocalStore, S3Store, StoreError, open_store
from sailyard.settings import Settings, get_settings


def test_everything_follows_from_home(isolated_home: Path) -> None:
    settings = get_settings()
    assert settings.home == isolated_home
    assert settings.store == f"file://{isolated_home}/store"
    assert settings.database_url == f"sqlite:///{isolated_home}/lineage.db"
    store = open_store(settings)
    assert isinstance(store, LocalStore)
    assert store.root == isolated_home / "store"


def test_relative_home_is_made_absolute_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings(home=Path("yard")).home == tmp_path / "yard"
    assert Settings(home=Path("~/yard")).home == Path.home() / "yard"


def test_child_process_reads_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAILYARD_STORE", "s3://bucket/deep/prefix/")
    monkeypatch.setenv("SAILYARD_S3_SECRET_KEY", "hush")
    monkeypatch.setenv("SAILYARD_S3_SECURE", "false")
    settings = get_settings()
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert get_settings() == settings
    assert "hush" not in repr(settings)
    store = open_store(settings)
    assert isinstance(store, S3Store)
    assert (store.bucket, store.prefix) == ("bucket", "deep/prefix/")


def test_bad_places_say_how_to_write_them() -> None:
    with pytest.raises(ValueError, match="file:///folder or s3://bucket/prefix"):
        Settings(store="ftp://host/place")
    with pytest.raises(ValueError, match="SAILYARD_S3_SECURE"):
        Settings(s3_endpoint="https://host")
    with pytest.raises(StoreError, match="write s3://bucket/prefix"):
        open_store(Settings(store="s3:///prefix"))
