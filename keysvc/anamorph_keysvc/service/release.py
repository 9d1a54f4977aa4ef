"""Release: the only way for key material out of the service."""

from __future__ import annotations

import base64
from datetime import datetime, timedelta
from typing import Literal

from sqlmodel import Session

from anamorph import errors
from anamorph.keys import TenantKey
from anamorph.wire.admin import ReleaseRead
from anamorph.wire.states import CLIENT_RELEASE, State
from anamorph_keysvc.credentials import Caller, GrantHolder
from anamorph_keysvc.scope import scope_of
from anamorph_keysvc.service import grants, lookup
from anamorph_keysvc.service.lookup import Releasable
from anamorph_keysvc.service.material import key_of
from anamorph_keysvc.service.transition import subject, wrong_state
from anamorph_keysvc.service.work import Service
from anamorph_keysvc.tables import Grant, KeyVersion
from anamorph_keysvc.wrapper import root_context


def to_client(service: Service, caller: Caller, at: tuple[str, str, int]) -> ReleaseRead:
    """The ``vocab`` subkey, in STAGED, ACTIVE and DRAINING.

    Raises:
        Conflict: not yet staged, or failed.
        Forbidden: suspended.
        Gone: retired, revoked or destroyed.
        Unavailable: the root has to be opened and the key-management service does not answer.
    """
    answer = _if_open(service, caller, at)
    if answer is None:
        with service.database.read(caller.scope) as session:
            row = lookup.version(session, *at)
            _check_client(row)
            kek = lookup.tenant(session, row.tenant).kek
        # The state is looked at again afterwards: what was revoked meanwhile stays here.
        answer = _if_open(service, caller, at, opened(service, row, kek)[1])
    if answer is None:
        raise errors.Unavailable("the key changed meanwhile; try again", code="busy", retry_after=1)
    return answer


def _if_open(
    service: Service, caller: Caller, at: tuple[str, str, int], key: TenantKey | None = None
) -> ReleaseRead | None:
    """The release by ``key`` or a root that is kept, in one transaction; ``None`` if there is neither."""
    with service.work(caller.actor, caller.scope) as work:
        row = lookup.releasable(work.session, *at)
        _check_client(row)
        key = key or _kept(service, row)
        if key is None or key.id != row.key_id:
            return None
        expires_at = work.now + timedelta(seconds=lookup.policy_of(row).client_cache_ttl_s)
        work.record(row.tenant, "release", subject(row), purpose="client")
        return _answer(row, row.vocab_size, "client", key.subkey("vocab"), expires_at)


def _kept(service: Service, row: Releasable) -> TenantKey | None:
    if row.ciphertext is None or row.key_id is None:
        return None
    root = service.roots.get(row.key_id, row.ciphertext)
    return None if root is None else key_of(root, row)


def to_job(
    service: Service, holder: GrantHolder, at: tuple[str, str, int], part: int | None = None
) -> ReleaseRead:
    """The root, once, to a current grant of a version in MATERIALIZING.

    ``part`` is what the asking job folds, ``None`` for one that finishes.

    Raises:
        Conflict: any other state, or the grant is void, used, expired or another part's.
        Unavailable: the key-management service does not answer; the grant is as good as before.
    """
    scope = scope_of(holder.tenant)
    with service.database.read(scope) as session:
        row = _for_job(session, holder, at, part, service.clock())[0]
        kek = lookup.tenant(session, row.tenant).kek
    root, _ = opened(service, row, kek)
    with service.work(f"grant:{holder.id}", scope) as work:
        row, grant = _for_job(work.session, holder, at, part, work.now)
        grant.used_at = work.now
        work.session.add(grant)
        model = lookup.model(work.session, row.tenant, row.model, lock=False)
        job = grants.in_audit(grant.parts, part)
        work.record(row.tenant, "release", subject(row), purpose="materialize", grant=grant.id, **job)
        return _answer(row, model.vocab_size, "materialize", root, grant.expires_at)


def _check_client(row: KeyVersion | Releasable) -> None:
    if row.state not in CLIENT_RELEASE:
        raise _refusal(row)


def _for_job(
    session: Session, holder: GrantHolder, at: tuple[str, str, int], part: int | None, now: datetime
) -> tuple[KeyVersion, Grant]:
    row = lookup.version(session, *at)
    grant = grants.of_holder(session, holder, row)
    grants.require_part(grant, part)
    if row.state is not State.MATERIALIZING:
        raise wrong_state(row, "release")
    if grant.used_at is not None:
        raise errors.Conflict("this grant has released its key already: ask for a new one", code="grant_used")
    if grant.expires_at <= now:
        raise errors.Conflict("this grant has expired: ask for a new one", code="grant_expired")
    return row, grant


def opened(service: Service, row: KeyVersion, kek: str) -> tuple[bytes, TenantKey]:
    """The root and its key; a root that does not give the row's check value is not the row's.

    Raises:
        Gone: the version has been destroyed.
        KeyMismatch: the stored root is another's.
    """
    if row.ciphertext is None or row.key_id is None:
        raise errors.Gone("this key has been destroyed", code="destroyed")
    root = service.roots.get(row.key_id, row.ciphertext)
    if root is None:
        root = service.wrapper.unwrap(kek, row.ciphertext, root_context(row.tenant, row.model, row.version))
    key = key_of(root, row)
    service.roots.put(row.key_id, row.ciphertext, root)
    return root, key


def _answer(
    row: KeyVersion | Releasable,
    vocab_size: int,
    purpose: Literal["client", "materialize"],
    secret: bytes,
    expires_at: datetime,
) -> ReleaseRead:
    return ReleaseRead(
        purpose=purpose,
        key_id=row.key_id or "",
        kcv=row.kcv or "",
        vocab_kcv=row.vocab_kcv or "",
        vocab_size=vocab_size,
        secret=base64.b64encode(secret).decode(),
        expires_at=expires_at,
    )


def _refusal(row: KeyVersion | Releasable) -> errors.ServiceError:
    if row.state is State.SUSPENDED:
        return errors.Forbidden("this key version is suspended", code="suspended")
    if row.state in {State.PENDING, State.MATERIALIZING, State.FAILED}:
        return wrong_state(row, "release")
    return errors.Gone(f"this key version is {row.state}: use the current one", code="key_gone")
