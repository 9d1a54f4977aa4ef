"""API keys and grants: 256 random bits behind a prefix, stored as SHA-256 only.

A fast hash is right here: there is nothing to guess in 256 random bits.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from sqlmodel import Session, select

from anamorph import errors
from anamorph.wire.admin import Role
from anamorph_keysvc.tables import ApiKey, Grant

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


def mint(prefix: str, entropy: Callable[[int], bytes]) -> str:
    """A new secret: prefix and 256 bits, URL-safe."""
    return prefix + base64.urlsafe_b64encode(entropy(_SECRET_BYTES)).decode().rstrip("=")


def hashed(secret: str) -> str:
    """What is stored in place of ``secret``."""
    return hashlib.sha256(secret.encode()).hexdigest()


def looks_like_ours(authorization: str) -> bool:
    """Whether an Authorization header could be one of our credentials at all."""
    scheme, _, secret = authorization.partition(" ")
    return scheme.lower() == "bearer" and secret.startswith((API_KEY, GRANT))


def authenticate(session: Session, authorization: str | None) -> Caller:
    """The caller that an Authorization header belongs to.

    Raises:
        Unauthenticated: none, foreign, unknown or revoked; one error for all.
    """
    secret = (authorization or "").partition(" ")[2]
    if authorization is None or not looks_like_ours(authorization):
        raise _refused()
    return _key_holder(session, secret) if secret.startswith(API_KEY) else _grant_holder(session, secret)


def _key_holder(session: Session, secret: str) -> Caller:
    key = session.exec(select(ApiKey).where(ApiKey.hash == hashed(secret))).one_or_none()
    if key is None or key.revoked_at is not None:
        raise _refused()
    return Caller(actor=f"key:{key.id}", role=key.role, tenant=key.tenant)


def _grant_holder(session: Session, secret: str) -> Caller:
    grant = session.exec(select(Grant).where(Grant.hash == hashed(secret))).one_or_none()
    if grant is None:
        raise _refused()
    holder = GrantHolder(grant.id, grant.tenant, grant.model, grant.version)
    return Caller(actor=f"grant:{grant.id}", tenant=grant.tenant, grant=holder)


def _refused() -> errors.Unauthenticated:
    return errors.Unauthenticated("send 'Authorization: Bearer' with a valid API key", code="unauthenticated")
