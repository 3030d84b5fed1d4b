"""The places a process works with, opened when first used."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from sailyard.settings import Settings, get_settings

if TYPE_CHECKING:
    from sailyard.artifacts import ArtifactStore, ObjectStore
    from sailyard.lineage import Database
    from sailyard.registry import Registry

# Shorter secrets would blank out ordinary words, and protect nothing.
_SHORTEST_SECRET = 4


class Yard:
    """Store, artifacts, database and registry of one set of settings."""

    def __init__(self, settings: Settings | None = None) -> None:
        """Args: settings: By default those of the environment."""
        self.settings = settings or get_settings()

    @cached_property
    def store(self) -> ObjectStore:
        """The object store."""
        from sailyard.artifacts import open_store

        return open_store(self.settings)

    @cached_property
    def artifacts(self) -> ArtifactStore:
        """Artifacts in that store, with a cache of fetched ones under home."""
        from sailyard.artifacts import ArtifactStore

        cache = self.settings.home / "cache" / "artifacts"
        return ArtifactStore(self.store, cache, self.settings.stream_bytes)

    @cached_property
    def database(self) -> Database:
        """The lineage database."""
        from sailyard.lineage import open_database

        return open_database(self.settings)

    @cached_property
    def registry(self) -> Registry:
        """The model registry in that database."""
        from sailyard.registry import Registry

        return Registry(self.database)

    def folder(self, *parts: str) -> Path:
        """A folder under home, made if need be."""
        path = self.settings.home.joinpath(*parts)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def redact(self, text: str) -> str:
        """The text with every secret of the settings replaced, also in its URL-quoted form."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    @cached_property
    def _secrets(self) -> list[str]:
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

        secrets = {self.settings.s3_access_key, self.settings.s3_secret_key.get_secret_value()}
        try:
            secrets.add(str(make_url(self.settings.database_url).password or ""))
        except ArgumentError:
            secrets.add(self.settings.database_url)
        secrets |= {quote(secret, safe="") for secret in secrets}
        # Longest first: one secret may be the start of another.
        return sorted((s for s in secrets if len(s) >= _SHORTEST_SECRET), key=len, reverse=True)
