"""Served tokens, and the rotations that fall due by them or by time."""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlmodel import Session, col, select

from anamorph import errors
from anamorph.wire.admin import KeyVersionRead, UsageReport
from anamorph.wire.states import State
from anamorph_keysvc.scope import WORKER
from anamorph_keysvc.service import lookup, rotation
from anamorph_keysvc.service.transition import change
from anamorph_keysvc.service.work import ACTOR, Service, Work
from anamorph_keysvc.tables import IN_FLIGHT, KeyVersion, Usage


def report(work: Work, tenant: str, model: str, version: int, body: UsageReport) -> KeyVersionRead:
    """Note a source's count; the highest per source stands, so reporting twice counts once."""
    row = lookup.version(work.session, tenant, model, version)
    key = (tenant, model, version, body.source)
    usage = work.session.get(Usage, key, with_for_update=True)
    known = 0 if usage is None else usage.tokens
    if body.tokens > known:
        usage = usage or Usage(tenant=tenant, model=model, version=version, source=body.source, tokens=0)
        usage.tokens = body.tokens
        work.session.add(usage)
        change(work, row, served_tokens=row.served_tokens + body.tokens - known)
    return lookup.version_read(row)


def due_rotations(session: Session, now: datetime, backoff: timedelta) -> list[tuple[str, str, str]]:
    """Tenant, model and reason of every rotation that the policies ask for at ``now``.

    A model whose newest version failed is left alone for ``backoff`` after that.
    """
    spent = col(KeyVersion.served_tokens) >= col(KeyVersion.token_limit)
    old = col(KeyVersion.rotate_at) <= now
    due = select(KeyVersion).where(KeyVersion.state == State.ACTIVE, spent | old)
    return [
        (active.tenant, active.model, _reason(active))
        for active in session.exec(due)
        if not _must_wait(session, active, now, backoff)
    ]


def _reason(active: KeyVersion) -> str:
    limit = active.token_limit
    return "token budget" if limit is not None and active.served_tokens >= limit else "period"


def _must_wait(session: Session, active: KeyVersion, now: datetime, backoff: timedelta) -> bool:
    newest = session.exec(
        select(KeyVersion)
        .where(KeyVersion.tenant == active.tenant, KeyVersion.model == active.model)
        .order_by(col(KeyVersion.version).desc())
        .limit(1)
    ).one()
    if newest.state in IN_FLIGHT:
        return True
    return newest.state is State.FAILED and now < newest.updated_at + backoff


def rotate_due(service: Service) -> int:
    """Begin every rotation that is due; answers how many began."""
    backoff = timedelta(seconds=service.limits.rotation_backoff_s)
    with service.database.read(WORKER) as session:
        due = due_rotations(session, service.clock(), backoff)
    begun = 0
    for tenant, model, reason in due:
        try:
            with service.work(ACTOR, WORKER) as work:
                rotation.rotate(work, tenant, model, reason)
        except errors.Conflict:
            continue  # someone else has begun one meanwhile, which is as good
        begun += 1
    return begun
