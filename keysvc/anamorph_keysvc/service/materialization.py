"""From PENDING to STAGED: grants, and what a job reports under its grant."""

from __future__ import annotations

from anamorph import errors
from anamorph.wire.admin import (
    Failure,
    GrantCreate,
    GrantRead,
    KeyVersionRead,
    Materialized,
    OperationRead,
    OperationStatus,
    Progress,
)
from anamorph.wire.states import State
from anamorph_keysvc.credentials import GrantHolder
from anamorph_keysvc.service import grants, lookup, rotation
from anamorph_keysvc.service.transition import move, require, subject, wrong_state
from anamorph_keysvc.service.work import Work
from anamorph_keysvc.tables import IN_FLIGHT, KeyVersion


def materialize(
    work: Work, tenant: str, model: str, version: int, expected: int | None, wanted: GrantCreate | None = None
) -> GrantRead:
    """PENDING to MATERIALIZING with a grant; in MATERIALIZING, a new grant that voids the old one.

    Raises:
        Conflict: any other state; or the grant of a part of which no materialisation has begun.
    """
    wanted = wanted or GrantCreate()
    row = lookup.version(work.session, tenant, model, version)
    require(row, expected)
    if row.state is State.PENDING and row.key_id is None:
        raise errors.Conflict(
            "the key of this version is still being prepared", code="key_pending", retry_after=1
        )
    if wanted.part is not None:
        return _part(work, row, wanted.parts or 0, wanted.part)
    parts = wanted.parts or 0
    if row.state is State.PENDING:
        move(work, row, State.MATERIALIZING, "materialize", detail=grants.in_audit(parts))
        rotation.follow(work, row, "materializing", 0.0)
    elif row.state is State.MATERIALIZING:
        work.record(tenant, "grant.renew", subject(row), **grants.in_audit(parts))
    else:
        raise wrong_state(row, "materialize")
    return grants.issue(work, row, parts)


def _part(work: Work, row: KeyVersion, parts: int, part: int) -> GrantRead:
    """The grant of a part: as often as its job is started again, and one at a time.

    Raises:
        Conflict: no materialisation in so many parts has begun.
    """
    if row.state is State.PENDING:
        raise errors.Conflict(
            "this materialisation has not begun: first ask for the grant of the job that finishes",
            code="not_begun",
        )
    if row.state is not State.MATERIALIZING:
        raise wrong_state(row, "materialize")
    issued = grants.current(work.session, row)
    begun = next(grant.parts for grant in issued if grants.part_of(grant) is None)
    if begun != parts:
        pieces = f"in {begun} parts" if begun else "in a single piece"
        raise errors.Conflict(
            f"this materialisation is {pieces}, not in {parts} parts: begin it anew, or join it as it is",
            code="other_parts",
        )
    again = any(grant.part == part for grant in issued)
    work.record(row.tenant, "grant.renew" if again else "grant", subject(row), **grants.in_audit(parts, part))
    return grants.issue(work, row, parts, part)


def progress(
    work: Work, holder: GrantHolder, tenant: str, model: str, version: int, body: Progress
) -> OperationRead:
    """Note a job's progress; that of parts is what all of them have done together.

    Raises:
        Conflict: the grant is void, or the version has left MATERIALIZING: the job should stop.
    """
    row = lookup.version(work.session, tenant, model, version)
    grant = grants.of_holder(work.session, holder, row)
    if row.state is not State.MATERIALIZING:
        raise wrong_state(row, "progress")
    if grants.part_of(grant) is None:
        return rotation.follow(work, row, body.phase, body.done)
    grant.done = body.done
    work.session.add(grant)
    work.session.flush()
    parts = [one.done for one in grants.current(work.session, row) if grants.part_of(one) is not None]
    return rotation.follow(work, row, body.phase, sum(parts) / grant.parts)


def stage(
    work: Work, holder: GrantHolder, tenant: str, model: str, version: int, body: Materialized
) -> KeyVersionRead:
    """MATERIALIZING to STAGED with the published replica; the same report again changes nothing.

    Raises:
        Conflict: the grant is void, a part's, or has never released the root, or another replica is staged.
    """
    row = lookup.version(work.session, tenant, model, version)
    grant = grants.of_holder(work.session, holder, row)
    grants.require_part(grant, None)
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
    row = lookup.version(work.session, tenant, model, version)
    job: dict[str, str | int | None] = {}
    if holder is not None:
        grant = grants.of_holder(work.session, holder, row)
        job = grants.in_audit(grant.parts, grants.part_of(grant))
    if row.state is State.FAILED:
        return lookup.version_read(row)
    admitted = {State.MATERIALIZING} if holder is not None else set(IN_FLIGHT)
    if row.state not in admitted:
        raise wrong_state(row, "fail")
    move(work, row, State.FAILED, "fail", detail={"reason": body.reason, **job}, failure=body.reason)
    rotation.end(work, row, OperationStatus.FAILED, body.reason)
    return lookup.version_read(row)
