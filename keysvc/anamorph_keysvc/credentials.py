"""API keys and grants: 256 random bits behind a prefix, stored as SHA-256 only.

A fast hash is right here: there is nothing to guess in 256 random bits.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from anamorph import errors
from anamorph.wire.admin import Role
from anamorph_keysvc.database import Database
from anamorph_keysvc.scope import PLATFORM, Scope, scope_of
from anamorph_keysvc.tables import Tenant

API_KEY = "amk_"
GRANT = "amg_"
_SECRET_BYTES = 32


@dataclass(frozen=True)
class GrantHolder:
    """The materialisation that a grant speaks for."""

    id: str
    tenant: str
    model: str
    version: int


@dataclass(frozen=True)
class Caller:
    """Who sent a request: the holder of an API key, or of a grant."""

    actor: str
    role: Role | None = None
    tenant: str | None = None
    grant: GrantHolder | None = None

    @property
    def scope(self) -> Scope:
        """What this caller's sessions see: its tenant's rows, or the platform's."""
        return scope_of(self.tenant)


def mint(prefix: str, entropy: Callable[[int], bytes]) -> str:
    """A new secret: prefix and 256 bits, URL-safe."""
    return prefix + base64.urlsafe_b64encode(entropy(_SECRET_BYTES)).decode().rstrip("=")


def hashed(secret: str) -> str:
    """What is stored in place of ``secret``."""
    return hashlib.sha256(secret.encode()).hexdigest()


def holder(database: Database, secret: str) -> Caller:
    """The caller that an API key or grant belongs to.

    Raises:
        Unauthenticated: unknown or revoked; one error for both.
    """
    known = database.find_credential(hashed(secret))
    if known is None or known.revoked:
        raise _refused()
    if known.role is not None:
        return Caller(actor=f"key:{known.id}", role=Role(known.role), tenant=known.tenant)
    grant = GrantHolder(known.id, known.tenant or "", known.model or "", known.version or 0)
    return Caller(actor=f"grant:{known.id}", tenant=known.tenant, grant=grant)


def tenant_exists(database: Database, tenant: str) -> bool:
    """Whether there is a tenant, for callers whose credential only claims one."""
    with database.read(PLATFORM) as session:
        return session.get(Tenant, tenant) is not None


def _refused() -> errors.Unauthenticated:
    return errors.Unauthenticated("send 'Authorization: Bearer' with a valid API key", code="unauthenticated")
