"""From PENDING to STAGED: grants, and what a job reports under its grant."""

from __future__ import annotations

from datetime import timedelta

from sqlmodel import Session, col, select

from anamorph import errors
from anamorph.wire.admin import (
    Failure,
    GrantRead,
    KeyVersionRead,
    Materialized,
    OperationRead,
    OperationStatus,
    Progress,
)
from anamorph.wire.states import State
from anamorph_keysvc import credentials
from anamorph_keysvc.credentials import GrantHolder
from anamorph_keysvc.service import lookup, rotation
from anamorph_keysvc.service.transition import move, require, subject, wrong_state
from anamorph_keysvc.service.work import Work, found
from anamorph_keysvc.tables import IN_FLIGHT, Grant, KeyVersion


def materialize(work: Work, tenant: str, model: str, version: int, expected: int | None) -> GrantRead:
    """PENDING to MATERIALIZING with a grant; in MATERIALIZING, a new grant that voids the old one.

    Raises:
        Conflict: any other state.
    """
    row = lookup.version(work.session, tenant, model, version)
    require(row, expected)
    if row.state is State.PENDING and row.key_id is None:
        raise errors.Conflict(
            "the key of this version is still being prepared", code="key_pending", retry_after=1
        )
    if row.state is State.PENDING:
        move(work, row, State.MATERIALIZING, "materialize")
        rotation.follow(work, row, "materializing", 0.0)
    elif row.state is State.MATERIALIZING:
        work.record(tenant, "grant.renew", subject(row))
    else:
        raise wrong_state(row, "materialize")
    return _grant(work, row)


def _grant(work: Work, row: KeyVersion) -> GrantRead:
    for older in work.session.exec(
        select(Grant).where(
            Grant.tenant == row.tenant,
            Grant.model == row.model,
            Grant.version == row.version,
            col(Grant.voided_at).is_(None),
        )
    ):
        older.voided_at = work.now
        work.session.add(older)
    # The old grant must be void in the database before the new one may exist there.
    work.session.flush()
    secret = credentials.mint(credentials.GRANT, work.entropy)
    expires_at = work.now + timedelta(seconds=work.limits.grant_ttl_s)
    work.session.add(
        Grant(
            id=work.fresh_id("grant"),
            hash=credentials.hashed(secret),
            tenant=row.tenant,
            model=row.model,
            version=row.version,
            created_at=work.now,
            expires_at=expires_at,
        )
    )
    return GrantRead(secret=secret, expires_at=expires_at)


def current_grant(session: Session, holder: GrantHolder, tenant: str, model: str, version: int) -> Grant:
    """The grant of a caller, if it still speaks for this version.

    Raises:
        NotFound: it speaks for another version.
        Conflict: a newer grant has taken its place.
    """
    matches = (holder.tenant, holder.model, holder.version) == (tenant, model, version)
    grant = found(session.get(Grant, holder.id) if matches else None, "key version")
    if grant.voided_at is not None:
        raise errors.Conflict("a newer grant has taken this one's place: stop", code="grant_void")
    return grant


def progress(
    work: Work, holder: GrantHolder, tenant: str, model: str, version: int, body: Progress
) -> OperationRead:
    """Note a job's progress.

    Raises:
        Conflict: the grant is void, or the version has left MATERIALIZING: the job should stop.
    """
    current_grant(work.session, holder, tenant, model, version)
    row = lookup.version(work.session, tenant, model, version)
    if row.state is not State.MATERIALIZING:
        raise wrong_state(row, "progress")
    return rotation.follow(work, row, body.phase, body.done)


def stage(
    work: Work, holder: GrantHolder, tenant: str, model: str, version: int, body: Materialized
) -> KeyVersionRead:
    """MATERIALIZING to STAGED with the published replica; the same report again changes nothing.

    Raises:
        Conflict: the grant is void or has never released the root, or another replica is staged.
    """
    grant = current_grant(work.session, holder, tenant, model, version)
    row = lookup.version(work.session, tenant, model, version)
    artifact = body.model_dump(mode="json")
    if row.artifact == artifact:
        return lookup.version_read(row)
    if grant.used_at is None:
        raise errors.Conflict("this grant has not released the key yet", code="grant_unused")
    move(
        work,
        row,
        State.STAGED,
        "stage",
        detail={"replica": body.replica, "manifest_sha256": body.manifest_sha256},
        artifact=artifact,
    )
    rotation.follow(work, row, "staged", 1.0)
    return lookup.version_read(row)


def fail(
    work: Work, holder: GrantHolder | None, tenant: str, model: str, version: int, body: Failure
) -> KeyVersionRead:
    """To FAILED; the ACTIVE version stays as it is. Failing again changes nothing.

    ``holder`` is the job's grant, which speaks for MATERIALIZING only, or ``None`` for the platform.

    Raises:
        Conflict: the grant is void, or the version is in service or beyond.
    """
    if holder is not None:
        current_grant(work.session, holder, tenant, model, version)
    row = lookup.version(work.session, tenant, model, version)
    if row.state is State.FAILED:
        return lookup.version_read(row)
    admitted = {State.MATERIALIZING} if holder is not None else set(IN_FLIGHT)
    if row.state not in admitted:
        raise wrong_state(row, "fail")
    move(work, row, State.FAILED, "fail", detail={"reason": body.reason}, failure=body.reason)
    rotation.end(work, row, OperationStatus.FAILED, body.reason)
    return lookup.version_read(row)
