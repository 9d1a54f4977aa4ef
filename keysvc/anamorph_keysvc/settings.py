"""Settings of the key service, from arguments or ``ANAMORPH_KEYSVC_…`` variables."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Limits(BaseSettings):
    """Bounds and intervals; durations in seconds.

    ``rotation_backoff_s`` is how long an automatic rotation waits after a failed one;
    ``request_deadline_s`` what a request may wait for database and KMS together;
    ``backup_retention_s`` how long any backup of the database is kept. A signing key of
    inference tokens is replaced every ``signing_period_s``, and published
    ``signing_lead_s`` before it signs: engines must have fetched it by then.
    """

    model_config = SettingsConfigDict(env_prefix="ANAMORPH_KEYSVC_", frozen=True)

    grant_ttl_s: int = Field(default=900, ge=1, le=3600)
    inference_token_ttl_s: int = Field(default=600, ge=30, le=900)
    idempotency_ttl_s: int = Field(default=86400, ge=60)
    rotation_backoff_s: int = Field(default=600, ge=1)
    background_interval_s: float = Field(default=5, gt=0)
    request_deadline_s: float = Field(default=3, gt=0, le=60)
    backup_retention_s: int = Field(default=35 * 86400, ge=0)
    signing_period_s: int = Field(default=30 * 86400, ge=3600)
    signing_lead_s: int = Field(default=300, ge=0)
    max_body_bytes: int = Field(default=2**20, ge=1024)
    # Per tenant and process; failed logins per address.
    reads_per_minute: int = Field(default=6000, ge=1)
    writes_per_minute: int = Field(default=1200, ge=1)
    releases_per_minute: int = Field(default=6000, ge=1)
    rotations_per_minute: int = Field(default=120, ge=1)
    failed_logins_per_minute: int = Field(default=600, ge=1)
