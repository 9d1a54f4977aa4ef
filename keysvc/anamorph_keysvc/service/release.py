"""Release: the only way for key material out of the service."""

from __future__ import annotations

import base64
import hmac
from datetime import datetime, timedelta

from anamorph import errors
from anamorph.keys import TenantKey
from anamorph.wire.admin import ReleaseRead
from anamorph.wire.states import CLIENT_RELEASE, State
from anamorph_keysvc.credentials import GrantHolder
from anamorph_keysvc.service import lookup
from anamorph_keysvc.service.materialization import current_grant
from anamorph_keysvc.service.transition import subject, wrong_state
from anamorph_keysvc.service.work import Work
from anamorph_keysvc.tables import Grant, KeyVersion
from anamorph_keysvc.wrapper import root_context


def to_client(work: Work, tenant: str, model: str, version: int) -> ReleaseRead:
    """The ``vocab`` subkey, in STAGED, ACTIVE and DRAINING.

    Raises:
        Conflict: not yet staged, or failed.
        Forbidden: suspended.
        Gone: retired, revoked or destroyed.
    """
    row = lookup.version(work.session, tenant, model, version)
    if row.state not in CLIENT_RELEASE:
        raise _refusal(row)
    policy = lookup.policy_of(lookup.model(work.session, tenant, model))
    expires_at = work.now + timedelta(seconds=policy.client_cache_ttl_s)
    _, key = _open(work, row)
    work.record(tenant, "release", subject(row), purpose="client")
    return _answer(work, row, "client", key.subkey("vocab"), expires_at)


def to_job(work: Work, holder: GrantHolder, tenant: str, model: str, version: int) -> ReleaseRead:
    """The root, once, to the current grant of a version in MATERIALIZING.

    Raises:
        Conflict: any other state, or the grant is void, used or expired.
    """
    grant = current_grant(work, holder, tenant, model, version)
    row = lookup.version(work.session, tenant, model, version)
    if row.state is not State.MATERIALIZING:
        raise wrong_state(row, "release")
    _use(work, grant)
    root, _ = _open(work, row)
    work.record(tenant, "release", subject(row), purpose="materialize", grant=grant.id)
    return _answer(work, row, "materialize", root, grant.expires_at)


def _use(work: Work, grant: Grant) -> None:
    if grant.used_at is not None:
        raise errors.Conflict("this grant has released its key already: ask for a new one", code="grant_used")
    if grant.expires_at <= work.now:
        raise errors.Conflict("this grant has expired: ask for a new one", code="grant_expired")
    grant.used_at = work.now
    work.session.add(grant)


def _open(work: Work, row: KeyVersion) -> tuple[bytes, TenantKey]:
    """The root and its key; a root that does not give the row's check value is not the row's."""
    if row.ciphertext is None:
        raise errors.Gone("this key has been destroyed", code="destroyed")
    root = work.wrapper.unwrap(row.ciphertext, root_context(row.tenant, row.model, row.version))
    key = TenantKey.from_root(root, row.tenant, row.model, row.version)
    if not hmac.compare_digest(key.id, row.key_id):
        raise errors.KeyMismatch(f"the stored root is not the one of {row.key_id}")
    return root, key


def _answer(work: Work, row: KeyVersion, purpose: str, secret: bytes, expires_at: datetime) -> ReleaseRead:
    return ReleaseRead(
        purpose="client" if purpose == "client" else "materialize",
        key_id=row.key_id,
        kcv=row.kcv,
        vocab_kcv=row.vocab_kcv,
        vocab_size=lookup.model(work.session, row.tenant, row.model).vocab_size,
        secret=base64.b64encode(secret).decode(),
        expires_at=expires_at,
    )


def _refusal(row: KeyVersion) -> errors.ServiceError:
    if row.state is State.SUSPENDED:
        return errors.Forbidden("this key version is suspended", code="suspended")
    if row.state in {State.PENDING, State.MATERIALIZING, State.FAILED}:
        return wrong_state(row, "release")
    return errors.Gone(f"this key version is {row.state}: use the current one", code="key_gone")
