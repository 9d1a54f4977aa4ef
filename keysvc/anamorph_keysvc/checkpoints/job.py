"""The background job that signs the heads of audit chains and exports them.

A run has three steps, and no network call inside a transaction: read which chains have
grown, sign each head and store it, export what is stored. A kill between two steps
leaves work for the next run, on any process: signatures are stored before they are
exported, so the same object is written again, and an object is never overwritten.
"""

from __future__ import annotations

import logging
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import and_, func, or_
from sqlmodel import Session, col, select

from anamorph import errors
from anamorph.wire.admin import AuditRead
from anamorph.wire.audit import START, Break, Checkpoint, cut_off, first_break
from anamorph.wire.checkpoints import SignedCheckpoint, signed_bytes
from anamorph_keysvc import audit
from anamorph_keysvc.checkpoints.export import export
from anamorph_keysvc.checkpoints.signer import CheckpointSigner
from anamorph_keysvc.tables import Audit, AuditCheckpoint, Tenant

logger = logging.getLogger(__name__)

Sessions = Callable[[], AbstractContextManager[Session]]
BATCH = 500


@dataclass(frozen=True)
class Grown:
    """A chain that ended at ``start`` when its last checkpoint was taken, and ends at ``head`` now."""

    tenant: str
    start: Checkpoint
    head: Checkpoint


@dataclass(frozen=True)
class Outcome:
    """What one run did.

    ``alarms`` say where a chain does not hold, or an export shows another chain than the
    database: each is a sign of tampering, or of a database restored from a backup.
    ``unavailable`` says what could not be reached; the rest is done by a later run.
    """

    signed: int = 0
    exported: int = 0
    alarms: tuple[str, ...] = ()
    unavailable: str | None = None

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(
            self.signed + other.signed,
            self.exported + other.exported,
            self.alarms + other.alarms,
            self.unavailable or other.unavailable,
        )


def checkpoint_all(
    read: Sessions,
    write: Sessions,
    signer: CheckpointSigner,
    destination: str,
    clock: Callable[[], datetime],
    *,
    interval: timedelta,
) -> Outcome:
    """Sign and export the heads of all chains that have grown; the background job.

    Args:
        read: opens a transaction that sees all tenants.
        write: the same, to change rows.
        signer: called outside any transaction.
        destination: folder or URL, see ``export``.
        clock: the time, aware.
        interval: a chain gets at most one checkpoint in this time.
    """
    signed = _sign_due(read, write, signer, clock, interval)
    return signed + _export_stored(read, write, destination, clock)


def _sign_due(
    read: Sessions,
    write: Sessions,
    signer: CheckpointSigner,
    clock: Callable[[], datetime],
    interval: timedelta,
) -> Outcome:
    done = Outcome()
    with read() as session:
        grown = due(session, clock(), interval=interval)
    for chain in grown:
        with read() as session:
            broken = check(session, chain)
        if broken is not None:
            # A signature would turn the damage into the truth.
            done += _alarm(
                f"the audit log of {chain.tenant} breaks at row {broken.sequence}: {broken.reason}"
            )
            continue
        try:
            checkpoint = sign(signer, chain.tenant, chain.head, clock())
            with write() as session:
                done += Outcome(signed=int(record(session, checkpoint)))
        except errors.Conflict:
            continue  # another process was faster, to the same effect
        except errors.Unavailable as error:
            return done + Outcome(unavailable=str(error))
    return done


def _export_stored(
    read: Sessions, write: Sessions, destination: str, clock: Callable[[], datetime]
) -> Outcome:
    done = Outcome()
    with read() as session:
        stored = unexported(session)
    for checkpoint in stored:
        try:
            export(destination, checkpoint)
        except errors.AuditRefused as error:
            done += _alarm(str(error))
            continue
        except errors.Unavailable as error:
            return done + Outcome(unavailable=str(error))
        with write() as session:
            mark_exported(session, checkpoint, clock())
        done += Outcome(exported=1)
    return done


def _alarm(message: str) -> Outcome:
    logger.error("audit alarm: %s", message)
    return Outcome(alarms=(message,))


def due(session: Session, now: datetime, *, interval: timedelta, limit: int = BATCH) -> list[Grown]:
    """Chains whose end is not the row of their last checkpoint, if that is at least ``interval`` old.

    Those that have waited longest come first. Every lookup is by primary key, so that
    a long log costs no more than a short one.
    """
    newest, last = _greatest(Audit), _greatest(AuditCheckpoint)
    at = col(AuditCheckpoint.at)
    columns: Any = (Tenant.id, Audit.sequence, Audit.digest, AuditCheckpoint.sequence, AuditCheckpoint.digest)
    statement = (
        select(*columns)
        .select_from(Tenant)
        .outerjoin(Audit, and_(col(Audit.tenant) == Tenant.id, col(Audit.sequence) == newest))
        .outerjoin(
            AuditCheckpoint,
            and_(col(AuditCheckpoint.tenant) == Tenant.id, col(AuditCheckpoint.sequence) == last),
        )
        .where(newest != last, or_(at.is_(None), at <= now - interval))
        .order_by(at.is_not(None), at, Tenant.id)
        .limit(limit)
    )
    return [_grown(*row) for row in session.exec(statement)]


def _greatest(table: type[Audit] | type[AuditCheckpoint]) -> Any:
    """The greatest sequence number of each tenant in ``table``, 0 if there is none."""
    greatest = select(func.max(table.sequence)).where(table.tenant == Tenant.id).correlate(Tenant)
    return func.coalesce(greatest.scalar_subquery(), START.sequence)


def _grown(tenant: str, *ends: Any) -> Grown:
    newest, digest, last, pinned = ends
    return Grown(
        tenant,
        start=START if last is None else Checkpoint(last, pinned),
        head=START if newest is None else Checkpoint(newest, digest),
    )


def check(session: Session, chain: Grown) -> Break | None:
    """The first row since the last checkpoint that does not hold, or is gone, if there is one."""
    rows = _rows(session, chain)
    return cut_off(chain.head, chain.start) or first_break(
        rows, tenant=chain.tenant, start=chain.start, until=chain.head
    )


def _rows(session: Session, chain: Grown) -> Iterator[AuditRead]:
    statement = (
        select(Audit)
        .where(
            Audit.tenant == chain.tenant,
            Audit.sequence > chain.start.sequence,
            Audit.sequence <= chain.head.sequence,
        )
        .order_by(col(Audit.sequence))
        .execution_options(yield_per=BATCH)
    )
    return map(audit.read, session.exec(statement))


def sign(signer: CheckpointSigner, tenant: str, head: Checkpoint, at: datetime) -> SignedCheckpoint:
    """A signed checkpoint of a chain's head. Not to be called inside a transaction.

    Raises:
        Unavailable: the signer does not answer.
    """
    version, signature = signer.sign(signed_bytes(tenant, head, at))
    return SignedCheckpoint(
        tenant=tenant,
        sequence=head.sequence,
        digest=head.digest,
        at=at,
        key_version=version,
        signature=b64encode(signature).decode("ascii"),
    )


def record(session: Session, checkpoint: SignedCheckpoint) -> bool:
    """Store a checkpoint that is to be exported; ``False`` if that row has one already."""
    if session.get(AuditCheckpoint, (checkpoint.tenant, checkpoint.sequence)) is not None:
        return False
    session.add(AuditCheckpoint(**checkpoint.model_dump(exclude={"format"})))
    session.flush()
    return True


def unexported(session: Session, *, limit: int = BATCH) -> list[SignedCheckpoint]:
    """Stored checkpoints that do not lie outside yet, oldest first."""
    waiting = (
        select(AuditCheckpoint)
        .where(col(AuditCheckpoint.exported_at).is_(None))
        .order_by(col(AuditCheckpoint.at), col(AuditCheckpoint.tenant))
        .limit(limit)
    )
    return [
        SignedCheckpoint.model_validate(row.model_dump(exclude={"exported_at"}))
        for row in session.exec(waiting)
    ]


def mark_exported(session: Session, checkpoint: SignedCheckpoint, now: datetime) -> None:
    """Note that a checkpoint lies outside."""
    row = session.get_one(AuditCheckpoint, (checkpoint.tenant, checkpoint.sequence))
    row.exported_at = now
    session.add(row)
    session.flush()
