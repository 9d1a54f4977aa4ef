"""Inference tokens: what a tenant sends to the compute zone instead of its API key."""

from __future__ import annotations

import base64
from contextlib import suppress
from datetime import datetime, timedelta

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlmodel import Session, col, select

from anamorph import errors
from anamorph.wire.admin import InferenceTokenRead, JwkSet, PublicKey
from anamorph_keysvc.credentials import Caller
from anamorph_keysvc.scope import WORKER
from anamorph_keysvc.service import lookup
from anamorph_keysvc.service.work import ACTOR, Service
from anamorph_keysvc.tables import SigningKey
from anamorph_keysvc.wrapper import PLATFORM_KEK, signing_context

ISSUER, AUDIENCE = "anamorph", "inference"
# The tenant of the unprotected baseline, which has no rows of its own.
PLAINTEXT = "plaintext"


def ensure_signing_key(service: Service) -> None:
    """Create the first signing key, which signs at once; nothing if there is one."""
    with service.database.read(WORKER) as session:
        known = _signing(session, service.clock())
    if known is None:
        _create(service, service.clock())


def rotate_signing_key(service: Service) -> JwkSet:
    """Publish a new signing key, which signs after ``signing_lead_s``; all keys published then.

    Raises:
        Conflict: one that does not sign yet is published already.
    """
    now = service.clock()
    with service.database.read(WORKER) as session:
        waiting = session.exec(select(SigningKey).where(col(SigningKey.signs_from) > now)).first()
    if waiting is not None:
        raise errors.Conflict("the next signing key is published already", code="rotation_in_flight")
    _create(service, now + timedelta(seconds=service.limits.signing_lead_s))
    with service.database.read(WORKER) as session:
        return public_keys(session)


def _create(service: Service, signs_from: datetime) -> None:
    seed, kid = service.entropy(32), f"sig_{service.entropy(12).hex()}"
    public = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
    ciphertext = service.wrapper.wrap(PLATFORM_KEK, seed, signing_context(kid))
    with service.work(ACTOR, WORKER) as work:
        # Two processes may get here: the later key simply signs after the earlier.
        work.session.add(
            SigningKey(
                kid=kid,
                public_key=_base64url(public),
                ciphertext=ciphertext,
                created_at=work.now,
                signs_from=signs_from,
            )
        )


def renew_signing_keys(service: Service) -> None:
    """Replace a key that has signed for its period; retire and erase those that signed before it.

    What signs now or next is opened before it is needed: the key-management service may be away then.

    A key is published for as long as a token of it may live, with as much again for clocks.
    """
    now = service.clock()
    with service.database.read(WORKER) as session:
        current = _signing(session, now)
        published = session.exec(select(SigningKey).where(col(SigningKey.retired_at).is_(None))).all()
    if current is None:
        return
    if now >= current.signs_from + timedelta(seconds=service.limits.signing_period_s):
        with suppress(errors.Conflict):
            rotate_signing_key(service)
    if now >= current.signs_from + timedelta(seconds=2 * service.limits.inference_token_ttl_s):
        _retire(service, [key.kid for key in published if key.signs_from < current.signs_from])
    needed = [key for key in published if key.signs_from >= current.signs_from]
    service.signing.keep_only({key.kid for key in needed})
    for key in needed:
        _opened(service, key)


def _opened(service: Service, row: SigningKey) -> Ed25519PrivateKey:
    ciphertext, context = row.ciphertext or b"", signing_context(row.kid)
    return service.signing.get(row.kid, lambda: service.wrapper.unwrap(PLATFORM_KEK, ciphertext, context))


def _retire(service: Service, kids: list[str]) -> None:
    if not kids:
        return
    with service.work(ACTOR, WORKER) as work:
        for key in work.session.exec(select(SigningKey).where(col(SigningKey.kid).in_(kids))):
            key.retired_at, key.ciphertext = work.now, None
            work.session.add(key)


def _signing(session: Session, now: datetime) -> SigningKey | None:
    """The key that signs: of those whose time has come, the newest."""
    return session.exec(
        select(SigningKey)
        .where(col(SigningKey.retired_at).is_(None), col(SigningKey.signs_from) <= now)
        .order_by(col(SigningKey.signs_from).desc(), col(SigningKey.kid))
        .limit(1)
    ).first()


def public_keys(session: Session) -> JwkSet:
    """The public keys that engines verify tokens with, those that sign later included."""
    rows = session.exec(select(SigningKey).where(col(SigningKey.retired_at).is_(None)))
    return JwkSet(keys=tuple(PublicKey(kid=row.kid, x=row.public_key) for row in rows))


def issue(service: Service, caller: Caller, tenant: str, model: str, subject: str) -> InferenceTokenRead:
    """A token for one model of one tenant; ``tenant`` may be ``plaintext``, for the baseline.

    Raises:
        NotFound: no such model.
        Unavailable: there is no signing key.
    """
    with service.database.read(caller.scope) as session:
        if tenant != PLAINTEXT:
            lookup.model(session, tenant, model)
        row = _signing(session, service.clock())
    if row is None or row.ciphertext is None:
        raise errors.Unavailable("there is no signing key: run 'anamorph-keysvc init'", code="not_ready")
    kid, key = row.kid, _opened(service, row)
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
    return InferenceTokenRead(
        token=jwt.encode(claims, key, algorithm="EdDSA", headers={"kid": kid}), expires_at=expires_at
    )


def _seconds(at: datetime) -> int:
    return int(at.timestamp())


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
