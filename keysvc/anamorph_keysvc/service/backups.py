"""Backups of the database, as whoever takes them reports them."""

from __future__ import annotations

from datetime import timedelta

from sqlmodel import select

from anamorph import errors
from anamorph.wire.admin import BackupCreate, BackupRead, OperationStatus
from anamorph_keysvc.service.shredding import AWAIT_BACKUP
from anamorph_keysvc.service.work import Work
from anamorph_keysvc.tables import Backup, Operation

_CLOCK_SKEW = timedelta(minutes=5)


def record(work: Work, body: BackupCreate) -> BackupRead:
    """Note a backup. Shredding goes on once one was taken after its last rewrap.

    Raises:
        Unprocessable: it would be from the future.
    """
    if body.taken_at > work.now + _CLOCK_SKEW:
        raise errors.Unprocessable(
            "a backup cannot be from the future", code="invalid_value", param="taken_at"
        )
    row = Backup(id=work.fresh_id("backup"), taken_at=body.taken_at, recorded_at=work.now)
    work.session.add(row)
    work.session.flush()
    _go_on(work)
    return BackupRead(**row.model_dump())


def _go_on(work: Work) -> None:
    """Let the shreddings that wait for a backup look at once."""
    for operation in work.session.exec(
        select(Operation).where(
            Operation.kind == "shred",
            Operation.status == OperationStatus.RUNNING,
            Operation.phase == AWAIT_BACKUP,
        )
    ):
        operation.next_attempt_at = work.now
        work.session.add(operation)
