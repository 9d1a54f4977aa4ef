"""Writing and reading the tenants' hash chains; what a chain is stands in ``anamorph.wire.audit``."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import bindparam, insert, select
from sqlmodel import Session

from anamorph.wire import audit as chain
from anamorph.wire.admin import AuditRead
from anamorph_keysvc.prepared import PreparedInsert, PreparedSelect
from anamorph_keysvc.tables import TABLES, Audit

_TENANT, _AUDIT = TABLES["tenant"], TABLES["audit"]
# FOR NO KEY UPDATE: rows that refer to the tenant may be written meanwhile.
_TURN = PreparedSelect(
    select(_TENANT.c.id).where(_TENANT.c.id == bindparam("tenant")).with_for_update(key_share=True)
)
_HEAD = PreparedSelect(
    select(_AUDIT.c.sequence, _AUDIT.c.digest)
    .where(_AUDIT.c.tenant == bindparam("tenant"))
    .order_by(_AUDIT.c.sequence.desc())
    .limit(1)
)
_APPEND = PreparedInsert(insert(_AUDIT))


def append(
    session: Session,
    *,
    tenant: str,
    at: datetime,
    actor: str,
    action: str,
    subject: str,
    detail: chain.Detail,
) -> None:
    """Add one row to a tenant's chain, in the transaction of what it records.

    Writers of one chain take turns by a lock on the tenant, the last that a transaction
    takes. Should two stand at one head all the same, the primary key (tenant, sequence)
    makes the second fail.
    """
    take_turn(session, tenant)
    row = chain.next_row(
        head(session, tenant),
        tenant=tenant,
        at=at,
        actor=actor,
        action=action,
        subject=subject,
        detail=detail,
    )
    _APPEND.run(session, row.model_dump())


def take_turn(session: Session, tenant: str) -> None:
    """Wait for the tenant's other writers, who from then on wait for this transaction."""
    _TURN.run(session, tenant=tenant)


def head(session: Session, tenant: str) -> chain.Checkpoint:
    """The end of a tenant's chain."""
    last = _HEAD.run(session, tenant=tenant).first()
    return chain.START if last is None else chain.Checkpoint(*last)


def read(row: Audit) -> AuditRead:
    """The row as it goes over the wire, and as its digest covers it."""
    return AuditRead.model_validate(row, from_attributes=True)
