"""From STAGED to the end: activation, suspension, revocation, retirement, destruction."""

from __future__ import annotations

import math
from datetime import datetime, timedelta

from anamorph import errors
from anamorph.wire.admin import Activation, Address, KeyVersionRead, OperationStatus
from anamorph.wire.states import SERVABLE, State
from anamorph_keysvc.service import lookup, rotation, schedule, shredding
from anamorph_keysvc.service.transition import change, move, require, subject, wrong_state
from anamorph_keysvc.service.work import Work
from anamorph_keysvc.tables import KeyVersion


def _load(work: Work, tenant: str, model: str, version: int, expected: int | None) -> KeyVersion:
    row = lookup.version(work.session, tenant, model, version)
    require(row, expected)
    return row


def activate(
    work: Work, tenant: str, model: str, version: int, expected: int | None, body: Activation
) -> KeyVersionRead:
    """STAGED to ACTIVE; the previous ACTIVE version goes to DRAINING in the same transaction.

    Raises:
        Conflict: not STAGED.
    """
    row = _load(work, tenant, model, version, expected)
    if row.state is not State.STAGED:
        raise wrong_state(row, "activate")
    owner = lookup.model(work.session, tenant, model)
    previous = lookup.in_states(work.session, owner, State.ACTIVE)
    if previous is not None:
        until = work.now + timedelta(seconds=lookup.policy_of(owner).grace_s)
        move(work, previous, State.DRAINING, "drain", drain_until=_later(previous.drain_until, until))
    move(
        work,
        row,
        State.ACTIVE,
        "activate",
        detail={"endpoint": body.endpoint},
        endpoint=body.endpoint,
        activated_at=work.now,
        **schedule.of(work.entropy, lookup.policy_of(owner), work.now),
    )
    rotation.end(work, row, OperationStatus.SUCCEEDED)
    return lookup.version_read(row)


def readdress(
    work: Work, tenant: str, model: str, version: int, expected: int | None, body: Address
) -> KeyVersionRead:
    """Where clients reach a version that has been activated; the address that it has changes nothing.

    Raises:
        Conflict: not ACTIVE, DRAINING or SUSPENDED. One that is STAGED gets its address with its activation.
    """
    row = _load(work, tenant, model, version, expected)
    if row.state not in SERVABLE - {State.STAGED}:
        raise wrong_state(row, "readdress")
    if row.endpoint != body.endpoint:
        former = row.endpoint
        change(work, row, endpoint=body.endpoint)
        work.record(row.tenant, "readdress", subject(row), endpoint=body.endpoint, former=former)
    return lookup.version_read(row)


def suspend(work: Work, tenant: str, model: str, version: int, expected: int | None) -> KeyVersionRead:
    """ACTIVE or DRAINING to SUSPENDED, which remembers where it came from."""
    row = _load(work, tenant, model, version, expected)
    move(work, row, State.SUSPENDED, "suspend", previous_state=row.state)
    return lookup.version_read(row)


def resume(work: Work, tenant: str, model: str, version: int, expected: int | None) -> KeyVersionRead:
    """SUSPENDED to where it came from.

    Raises:
        Conflict: not suspended, or it was ACTIVE and another version is by now.
    """
    row = _load(work, tenant, model, version, expected)
    if row.state is not State.SUSPENDED or row.previous_state is None:
        raise wrong_state(row, "resume")
    owner = lookup.model(work.session, tenant, model)
    active = lookup.in_states(work.session, owner, State.ACTIVE)
    if row.previous_state is State.ACTIVE and active is not None:
        raise errors.Conflict(
            f"version {active.version} is ACTIVE by now: revoke {subject(row)} or leave it suspended",
            code="another_active",
        )
    move(work, row, row.previous_state, "resume", previous_state=None)
    return lookup.version_read(row)


def revoke(work: Work, tenant: str, model: str, version: int, expected: int | None) -> KeyVersionRead:
    """Anything living to COMPROMISED: nothing is released or served under it from now on."""
    row = _load(work, tenant, model, version, expected)
    move(work, row, State.COMPROMISED, "revoke")
    rotation.end(work, row, OperationStatus.FAILED, "revoked")
    return lookup.version_read(row)


def retire(work: Work, tenant: str, model: str, version: int, expected: int | None) -> KeyVersionRead:
    """DRAINING to RETIRED.

    Raises:
        Conflict: not draining, or clients may still use it.
    """
    row = _load(work, tenant, model, version, expected)
    if row.state is not State.DRAINING:
        raise wrong_state(row, "retire")
    _not_before(work, row.drain_until, "draining")
    move(work, row, State.RETIRED, "retire")
    return lookup.version_read(row)


def destroy(work: Work, tenant: str, model: str, version: int, expected: int | None) -> KeyVersionRead:
    """RETIRED, FAILED or COMPROMISED to DESTROY_SCHEDULED, after the policy's delay.

    A version restored and scheduled again is never destroyed earlier than it was
    to be the first time, even if the delay has been shortened since.
    """
    row = _load(work, tenant, model, version, expected)
    policy = lookup.policy_of(lookup.model(work.session, tenant, model, lock=False))
    at = _later(row.destroy_at, work.now + timedelta(seconds=policy.destroy_delay_s))
    detail: dict[str, str | int | None] = {"destroy_at": at.isoformat()}
    move(
        work,
        row,
        State.DESTROY_SCHEDULED,
        "destroy",
        detail=detail,
        previous_state=row.state,
        destroy_at=at,
    )
    return lookup.version_read(row)


def restore(work: Work, tenant: str, model: str, version: int, expected: int | None) -> KeyVersionRead:
    """DESTROY_SCHEDULED back to RETIRED.

    Raises:
        Conflict: not scheduled, or it was not RETIRED before: what was compromised
            or has failed does not come back.
    """
    row = _load(work, tenant, model, version, expected)
    if row.state is not State.DESTROY_SCHEDULED:
        raise wrong_state(row, "restore")
    if row.previous_state is not State.RETIRED:
        raise errors.Conflict(
            f"this version was {row.previous_state}; only a retired one is restored", code="not_restorable"
        )
    move(work, row, State.RETIRED, "restore", previous_state=None)
    return lookup.version_read(row)


def destroyed(work: Work, tenant: str, model: str, version: int, expected: int | None) -> KeyVersionRead:
    """DESTROY_SCHEDULED to DESTROYED, which erases the root's ciphertext.

    Raises:
        Conflict: not scheduled, or before ``destroy_at``.
    """
    row = _load(work, tenant, model, version, expected)
    if row.state is not State.DESTROY_SCHEDULED:
        raise wrong_state(row, "destroyed")
    _not_before(work, row.destroy_at, "waiting to be destroyed")
    move(
        work,
        row,
        State.DESTROYED,
        "destroyed",
        ciphertext=None,
        kek_version=None,
        destroyed_at=work.now,
        destroy_complete_after=work.now + timedelta(seconds=work.limits.backup_retention_s),
    )
    shredding.begin(work, tenant)
    return lookup.version_read(row)


def _later(old: datetime | None, new: datetime) -> datetime:
    return new if old is None else max(old, new)


def _not_before(work: Work, deadline: datetime | None, what: str) -> None:
    if deadline is not None and work.now < deadline:
        left = math.ceil((deadline - work.now).total_seconds())
        raise errors.Conflict(f"still {what}: {left} s left", code="too_early", retry_after=left)
