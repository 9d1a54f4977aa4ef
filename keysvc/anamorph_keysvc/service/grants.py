"""Grants: each lets one job of a materialisation read the root once, and report."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from sqlmodel import Session, col, select

from anamorph import errors
from anamorph.wire.admin import GrantRead
from anamorph_keysvc import credentials
from anamorph_keysvc.credentials import GrantHolder
from anamorph_keysvc.service.work import Work, found
from anamorph_keysvc.tables import Grant, KeyVersion


def issue(work: Work, row: KeyVersion, parts: int, part: int | None = None) -> GrantRead:
    """A new grant of ``part``, or, for ``None``, of the job that finishes.

    A part's takes the place of that part's older one only; the finishing job's voids all,
    so that no job of a materialisation that was begun before has a say in this one.
    """
    for older in current(work.session, row):
        if part is None or older.part == part:
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
            parts=parts,
            part=parts if part is None else part,
        )
    )
    return GrantRead(secret=secret, expires_at=expires_at)


def current(session: Session, row: KeyVersion) -> Sequence[Grant]:
    """The grants of a version that are not void."""
    return session.exec(
        select(Grant).where(
            Grant.tenant == row.tenant,
            Grant.model == row.model,
            Grant.version == row.version,
            col(Grant.voided_at).is_(None),
        )
    ).all()


def of_holder(session: Session, holder: GrantHolder, row: KeyVersion) -> Grant:
    """The grant of a caller, if it still speaks for this version.

    It is read when the version is held already: whoever uses or voids it holds the version too.

    Raises:
        NotFound: it speaks for another version.
        Conflict: a newer grant has taken its place.
    """
    matches = (holder.tenant, holder.model, holder.version) == (row.tenant, row.model, row.version)
    grant = found(session.get(Grant, holder.id) if matches else None, "key version")
    if grant.voided_at is not None:
        raise errors.Conflict("a newer grant has taken this one's place: stop", code="grant_void")
    return grant


def require_part(grant: Grant, part: int | None) -> None:
    """Refuse a job that is not the grant's.

    Args:
        grant: as the caller's job bears it.
        part: what the job folds; ``None`` for the one that finishes.

    Raises:
        Conflict: the grant is another job's.
    """
    if part != part_of(grant):
        raise errors.Conflict(
            f"this grant is for {_job(part_of(grant), grant.parts)}, not for {_job(part, grant.parts)}",
            code="grant_part",
        )


def part_of(grant: Grant) -> int | None:
    """The part that the grant's job folds; ``None`` for the one that finishes."""
    return None if grant.part == grant.parts else grant.part


def in_audit(parts: int, part: int | None = None) -> dict[str, str | int | None]:
    """How the audit log names a job; nothing for a materialisation in a single piece."""
    if not parts:
        return {}
    return {"parts": parts} if part is None else {"parts": parts, "part": part}


def _job(part: int | None, parts: int) -> str:
    if part is None:
        return "the job that finishes"
    return f"part {part} of {parts}" if part < parts else f"part {part}"
