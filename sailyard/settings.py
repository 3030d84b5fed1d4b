"""Where this machine keeps things. Read from ``SAILYARD_*`` environment variables only.

A recipe says what is built; settings say where it lies. No setting enters a cache key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """The yard's places and keys."""

    model_config = SettingsConfigDict(
        env_prefix="SAILYARD_",
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
    )

    home: Path = Path(".sailyard")
    """Folder of all local state; made absolute when read, so child processes agree on it."""

    store: str = ""
    """Artifact store: ``file:///folder`` or ``s3://bucket/prefix``; empty: <home>/store."""

    s3_endpoint: str = "localhost:9000"
    """Host and port of the S3 server, without a scheme."""

    s3_access_key: str = ""
    """S3 access key id; empty sends unsigned requests."""

    s3_secret_key: SecretStr = SecretStr("")
    """S3 secret key."""

    s3_secure: bool = True
    """Speak TLS to the S3 server."""

    s3_region: str = "us-east-1"
    """S3 region; named so that no request is spent on asking for it."""

    stream_bytes: int = Field(32 << 30, ge=0)
    """Bytes that copies of dataset shards may take under home while training reads them from an S3
    store; the ones read longest ago make room. Shards that are open stay even above this."""

    database_url: str = ""
    """SQLAlchemy URL of the lineage database; empty: sqlite in <home>/lineage.db."""

    metrics_port: int | None = Field(None, ge=0, le=65535)
    """Port on which a running stage shows its newest figures to Prometheus; none by default."""

    ranks: int = Field(1, ge=1, le=64)
    """Processes on this machine that share a training stage: as many as it has GPUs."""

    ray_address: str = Field("", pattern=r"^$|^local$|^auto$|^[A-Za-z0-9.-]+:[0-9]+$")
    """Ray cluster over which curation spreads its networks: ``local`` starts one here, ``auto`` is
    the one that this machine is part of, ``host:port`` names its head; empty: this process."""

    ray_workers: int = Field(1, ge=1, le=4096)
    """Actors on that cluster, each with a network of its own on one GPU, or on one CPU where
    there is no GPU."""

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @field_validator("store")
    @classmethod
    def _known_scheme(cls, store: str) -> str:
        if store and not store.startswith(("file://", "s3://")):
            raise ValueError(
                f"SAILYARD_STORE is {store!r}; write file:///folder or s3://bucket/prefix"
            )
        return store.rstrip("/")

    @field_validator("s3_endpoint")
    @classmethod
    def _host_only(cls, endpoint: str) -> str:
        if "://" in endpoint:
            raise ValueError(
                f"SAILYARD_S3_ENDPOINT is {endpoint!r}; write host:port and say TLS or not with "
                "SAILYARD_S3_SECURE"
            )
        return endpoint

    @model_validator(mode="after")
    def _fill_defaults(self) -> Self:
        if not self.store:
            self.store = f"file://{self.home}/store"
        if not self.database_url:
            self.database_url = f"sqlite:///{self.home}/lineage.db"
        return self

    def environment(self) -> dict[str, str]:
        """These settings as environment variables for a child process; holds the secret key."""
        return {
            "SAILYARD_HOME": str(self.home),
            "SAILYARD_STORE": self.store,
            "SAILYARD_S3_ENDPOINT": self.s3_endpoint,
            "SAILYARD_S3_ACCESS_KEY": self.s3_access_key,
            "SAILYARD_S3_SECRET_KEY": self.s3_secret_key.get_secret_value(),
            "SAILYARD_S3_SECURE": "true" if self.s3_secure else "false",
            "SAILYARD_S3_REGION": self.s3_region,
            "SAILYARD_STREAM_BYTES": str(self.stream_bytes),
            "SAILYARD_DATABASE_URL": self.database_url,
            "SAILYARD_RANKS": str(self.ranks),
            "SAILYARD_RAY_ADDRESS": self.ray_address,
            "SAILYARD_RAY_WORKERS": str(self.ray_workers),
            **(
                {}
                if self.metrics_port is None
                else {"SAILYARD_METRICS_PORT": str(self.metrics_port)}
            ),
        }


def get_settings() -> Settings:
    """The settings of the current environment; read afresh each time, it is cheap."""
    return Settings()
