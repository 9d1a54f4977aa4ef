"""Settings of the key service, from arguments or ``ANAMORPH_KEYSVC_…`` variables."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Limits(BaseSettings):
    """Bounds and intervals; durations in seconds.

    ``rotation_backoff_s`` is how long an automatic rotation waits after a failed one.
    """

    model_config = SettingsConfigDict(env_prefix="ANAMORPH_KEYSVC_", frozen=True)

    grant_ttl_s: int = Field(default=900, ge=1, le=3600)
    inference_token_ttl_s: int = Field(default=600, ge=30, le=900)
    idempotency_ttl_s: int = Field(default=86400, ge=60)
    rotation_backoff_s: int = Field(default=600, ge=1)
    background_interval_s: float = Field(default=5, gt=0)
    max_body_bytes: int = Field(default=2**20, ge=1024)
