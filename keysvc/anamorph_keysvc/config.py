"""The production service's configuration, one TOML file. No setting is a secret: files are named.

database = "postgresql://anamorph_service@db.internal/anamorph?sslmode=verify-full"
platform_key_file = "/var/lib/anamorph/platform-admin.key"
[vault]
address = "https://vault.internal:8200"
…
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from anamorph_keysvc import toml
from anamorph_keysvc.identity.settings import IdentitySettings
from anamorph_keysvc.settings import Limits
from anamorph_keysvc.vault.settings import VaultSettings
from anamorph_keysvc.webhooks.settings import WebhookSettings


class AuditSettings(BaseModel):
    """Where signed checkpoints of audit chains go; without a destination none are made.

    Args:
        destination: folder or URL (``s3://…``) that the database's administrators cannot write to.
        interval_s: a chain gets at most one checkpoint in this time.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    destination: str | None = None
    interval_s: float = Field(default=300, gt=0)


class ServiceConfig(BaseModel):
    """Everything that a process of the production service needs to know.

    Args:
        database: URL of PostgreSQL, as the login role ``anamorph_service``, without a password:
            that comes from libpq's password file (``PGPASSFILE``) or a client certificate.
        pool_size: connections that this process holds at most.
        platform_key_file: the platform's API key, 0600, written by ``init`` where it is missing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    database: str
    pool_size: int = Field(default=16, ge=2, le=200)
    platform_key_file: Path
    vault: VaultSettings
    identity: IdentitySettings = Field(default_factory=IdentitySettings)
    webhooks: WebhookSettings = Field(default_factory=WebhookSettings)
    audit: AuditSettings = AuditSettings()
    limits: Limits = Field(default_factory=Limits)

    @model_validator(mode="after")
    def _fit_for_production(self) -> ServiceConfig:
        if self.identity.development and self.vault.production:
            raise ValueError("identity.development is for one machine: it admits issuers without TLS")
        return self


def load(path: Path) -> ServiceConfig:
    """Read the configuration.

    Raises:
        SetupError: no such file, no TOML, or not this configuration; what the file holds is not repeated.
    """
    return toml.read(path, ServiceConfig)
