"""What the endpoint may be told from outside: bounds, the key, which version to serve.

Everything here is our choice: the paper says nothing about serving. The bounds exist because one
request must never be able to take the server away from the others.
"""

from __future__ import annotations

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class ServingSettings(BaseSettings):
    """Environment variables ``SAILYARD_SERVE_<FIELD>``; flags of ``python -m serving`` win."""

    model_config = SettingsConfigDict(
        env_prefix="SAILYARD_SERVE_", extra="forbid", use_attribute_docstrings=True
    )

    alias: str = "production"
    """Registry alias whose version is served."""

    version: str = ""
    """Digest of one checkpoint, served whatever the alias does, and ready only after its own smoke
    test: what a rollout gives a pod. Empty: follow the alias."""

    poll_seconds: float = Field(5.0, gt=0)
    """How often the alias is looked up, in seconds; /admin/reload looks at once."""

    api_key: SecretStr | None = None
    """When set, /v1 and /admin want ``Authorization: Bearer <key>``; health and metrics do not."""

    max_body_bytes: int = Field(32 * 2**20, gt=0)
    """Largest request body, in bytes."""

    body_seconds: float = Field(60.0, gt=0)
    """How long a client may take to send its body."""

    max_images: int = Field(16, ge=0)
    """Most images in one request, over all its messages (16 = the paper's frames of a video)."""

    max_pixels: int = Field(64_000_000, gt=0)
    """Most pixels in one request, over all its images; read from the headers before decoding."""

    max_messages: int = Field(64, gt=0)
    """Most turns in one request."""

    max_prompt_tokens: int = Field(16_384, gt=0)
    """Longest prompt, in tokens, images included (the paper's post-training length)."""

    max_new_tokens: int = Field(4_096, gt=0)
    """Largest ``max_tokens`` a request may ask for (the paper's generation length in RL)."""

    default_max_tokens: int = Field(512, gt=0)
    """Used where a request gives no ``max_tokens``; cut to what the context has left."""

    max_batch: int = Field(8, gt=0)
    """Replies written at the same time."""

    max_queue: int = Field(64, gt=0)
    """Requests that may wait for a place in the batch; more are answered 429."""

    threads: int = Field(0, ge=0)
    """CPU threads of the engine; 0 leaves torch's own choice."""

    dtype: str = Field("float32", pattern="^(float32|bfloat16)$")
    """Number format of the weights in memory."""
