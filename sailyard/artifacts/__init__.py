"""Immutable artifacts on a local folder or S3, with one layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sailyard.artifacts.artifacts import (
    Artifact,
    ArtifactCorrupt,
    ArtifactError,
    ArtifactFile,
    ArtifactNotFound,
    ArtifactStore,
    ArtifactStream,
)
from sailyard.artifacts.local import LocalStore
from sailyard.artifacts.objects import (
    ContentChanged,
    ObjectNotFound,
    ObjectStore,
    StoreError,
    StoreFull,
    StoreUnavailable,
    canonical_json,
)
from sailyard.settings import Settings

if TYPE_CHECKING:
    from sailyard.artifacts.s3 import S3Store

__all__ = [
    "Artifact",
    "ArtifactCorrupt",
    "ArtifactError",
    "ArtifactFile",
    "ArtifactNotFound",
    "ArtifactStore",
    "ArtifactStream",
    "ContentChanged",
    "LocalStore",
    "ObjectNotFound",
    "ObjectStore",
    "S3Store",
    "StoreError",
    "StoreFull",
    "StoreUnavailable",
    "canonical_json",
    "open_artifacts",
    "open_store",
]


def __getattr__(name: str) -> Any:
    """S3Store, imported when asked for: the S3 client costs every stage's start on local disks."""
    if name == "S3Store":
        from sailyard.artifacts.s3 import S3Store

        return S3Store
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def open_store(settings: Settings) -> ObjectStore:
    """The object store that the settings name; nothing is contacted yet."""
    if settings.store.startswith("s3://"):
        from sailyard.artifacts.s3 import S3Store

        return S3Store(settings)
    return LocalStore(Path(settings.store.removeprefix("file://")))


def open_artifacts(settings: Settings) -> ArtifactStore:
    """Artifacts on that store, with the local cache in ``<home>/cache/artifacts``."""
    cache = settings.home / "cache" / "artifacts"
    return ArtifactStore(open_store(settings), cache, settings.stream_bytes)
