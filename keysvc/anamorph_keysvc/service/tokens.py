"""Inference tokens: what a tenant sends to the compute zone instead of its API key."""

from __future__ import annotations

import base64
from datetime import datetime, timedelta

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlmodel import Session, col, select

from anamorph import errors
from anamorph.wire.admin import InferenceTokenRead, JwkSet, PublicKey
from anamorph_keysvc.service import lookup
from anamorph_keysvc.service.work import Service, Work
from anamorph_keysvc.tables import SigningKey
from anamorph_keysvc.wrapper import signing_context

ISSUER, AUDIENCE = "anamorph", "inference"
# The tenant of the unprotected baseline, which has no rows of its own.
PLAINTEXT = "plaintext"


def ensure_signing_key(work: Work) -> None:
    """Create the signing key if there is none yet."""
    if _current(work.session) is not None:
        return
    seed = work.entropy(32)
    key = Ed25519PrivateKey.from_private_bytes(seed)
    kid = work.fresh_id("sig")
    work.session.add(
        SigningKey(
            kid=kid,
            public_key=_base64url(key.public_key().public_bytes_raw()),
            ciphertext=work.wrapper.wrap(seed, signing_context(kid)),
            created_at=work.now,
        )
    )


def _current(session: Session) -> SigningKey | None:
    return session.exec(
        select(SigningKey)
        .where(col(SigningKey.retired_at).is_(None))
        .order_by(col(SigningKey.created_at).desc())
        .limit(1)
    ).first()


def public_keys(session: Session) -> JwkSet:
    """The public keys that engines verify tokens with."""
    rows = session.exec(select(SigningKey).where(col(SigningKey.retired_at).is_(None)))
    return JwkSet(keys=tuple(PublicKey(kid=row.kid, x=row.public_key) for row in rows))


def issue(service: Service, tenant: str, model: str, subject: str) -> InferenceTokenRead:
    """A token for one model of one tenant; ``tenant`` may be ``plaintext``, for the baseline.

    Raises:
        NotFound: no such model.
        Unavailable: there is no signing key.
    """
    with service.database.read() as session:
        if tenant != PLAINTEXT:
            lookup.model(session, tenant, model)
        row = _current(session)
    if row is None:
        raise errors.Unavailable("there is no signing key: run 'anamorph-keysvc init'", code="not_ready")
    seed = service.wrapper.unwrap(row.ciphertext, signing_context(row.kid))
    now = service.clock()
    expires_at = now + timedelta(seconds=service.limits.inference_token_ttl_s)
    claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "tenant": tenant,
        "model": model,
        "sub": subject,
        "iat": _seconds(now),
        "exp": _seconds(expires_at),
    }
    key = Ed25519PrivateKey.from_private_bytes(seed)
    return InferenceTokenRead(
        token=jwt.encode(claims, key, algorithm="EdDSA", headers={"kid": row.kid}), expires_at=expires_at
    )


def _seconds(at: datetime) -> int:
    return int(at.timestamp())


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
