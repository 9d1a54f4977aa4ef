"""Writing and reading the tenants' hash chains; what a chain is stands in ``anamorph.wire.audit``."""

from __future__ import annotations

from datetime import datetime

from sqlmodel import Session, col, select

from anamorph.wire import audit as chain
from anamorph.wire.admin import AuditRead
from anamorph_keysvc.tables import Audit, Tenant


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
    session.add(Audit(**row.model_dump()))
    session.flush()


def take_turn(session: Session, tenant: str) -> None:
    """Wait for the tenant's other writers, who from then on wait for this transaction."""
    # FOR NO KEY UPDATE: rows that refer to the tenant may be written meanwhile.
    session.exec(select(Tenant.id).where(Tenant.id == tenant).with_for_update(key_share=True))


def head(session: Session, tenant: str) -> chain.Checkpoint:
    """The end of a tenant's chain."""
    last = session.exec(
        select(Audit.sequence, Audit.digest)
        .where(Audit.tenant == tenant)
        .order_by(col(Audit.sequence).desc())
        .limit(1)
    ).first()
    return chain.START if last is None else chain.Checkpoint(*last)


def read(row: Audit) -> AuditRead:
    """The row as it goes over the wire, and as its digest covers it."""
    return AuditRead.model_validate(row, from_attributes=True)
