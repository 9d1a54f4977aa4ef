"""Shredding: what a destroyed version's backups still hold is made useless.

One KEK serves all versions of a tenant, so its old versions can only go when nothing
that lives is wrapped under them any more. In this order (keyservice.md): rotate the KEK,
rewrap all survivors, open each to verify, wait for a backup taken after that, then raise
the floors and trim.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlmodel import col, select

from anamorph.wire.admin import OperationStatus
from anamorph.wire.states import State
from anamorph_keysvc import deadline
from anamorph_keysvc.scope import WORKER
from anamorph_keysvc.service import leases, lookup, steps
from anamorph_keysvc.service.material import key_of
from anamorph_keysvc.service.rewrapping import BATCH, OfTenant, context_of, rewrap_rows, survivors
from anamorph_keysvc.service.work import ACTOR, Service, Work
from anamorph_keysvc.tables import Backup, KeyVersion, Operation, Webhook

AWAIT_BACKUP = "await-backup"
LONGEST_CLIENT_CACHE_S = 600
_WAIT_S = 60
_ATTEMPT_S = 60.0


def begin(work: Work, tenant: str) -> None:
    """Ask for the shredding of a tenant's old KEK versions; one at a time, the rest goes with it."""
    running = work.session.exec(
        select(Operation).where(
            Operation.tenant == tenant,
            Operation.kind == "shred",
            Operation.status == OperationStatus.RUNNING,
        )
    ).one_or_none()
    if running is not None:
        # What it has rewrapped so far may have been read before this destruction: from the start.
        running.phase, running.floor, running.next_attempt_at = "rotate-kek", None, work.now
        work.session.add(running)
        return
    steps.begin(work, "shred", "rotate-kek", tenant)


def shred_due(service: Service) -> int:
    """Take every shredding that is due as far as it goes now; answers how many there were."""
    waiting = leases.due(service, "shred")
    for operation in waiting:
        with leases.leased(service, operation) as ours, deadline.within(_ATTEMPT_S):
            if ours:
                _go_on(service, operation)
    return len(waiting)


def _go_on(service: Service, operation: str) -> None:
    steps = {"rotate-kek": _rotate, "rewrap": _rewrap, AWAIT_BACKUP: _await_backup, "trim": _trim}
    while True:
        with service.database.read(WORKER) as session:
            row = session.get(Operation, operation)
            kek = None if row is None else lookup.tenant(session, row.tenant).kek
        if row is None or kek is None or row.status is not OperationStatus.RUNNING:
            return
        if not steps[row.phase](service, row, kek):
            return


def _rotate(service: Service, row: Operation, kek: str) -> bool:
    if service.wrapper.newest(kek) == 0:
        _advance(service, row, "trim", 0.9)  # nothing was ever wrapped: there is nothing to erase
        return True
    _advance(service, row, "rewrap", 0.2, floor=service.wrapper.rotate(kek))
    return True


def _rewrap(service: Service, row: Operation, kek: str) -> bool:
    while rows := _below(service, row.tenant, row.floor or 0):
        rewrap_rows(service, kek, rows)
        leases.extend(service, row.id)
    with service.database.read(WORKER) as session:
        alive = list(survivors(session, row.tenant))
    for number, survivor in enumerate(alive):
        _verify(service, kek, survivor)
        if number % BATCH == 0:
            leases.extend(service, row.id)
    _advance(service, row, AWAIT_BACKUP, 0.6)
    return True


def _verify(service: Service, kek: str, row: OfTenant) -> None:
    """Open a survivor's root: only then may the version of the KEK that it was under before go.

    Raises:
        KeyMismatch: it is not the row's. Nothing is erased then.
    """
    secret = service.wrapper.unwrap(kek, row.ciphertext or b"", context_of(row))
    if isinstance(row, KeyVersion):
        key_of(secret, row)


def _await_backup(service: Service, row: Operation, kek: str) -> bool:  # noqa: ARG001 -- one signature
    with service.database.read(WORKER) as session:
        newest = session.exec(select(Backup.taken_at).order_by(col(Backup.taken_at).desc()).limit(1)).first()
    if newest is None or newest <= row.updated_at:
        _advance(service, row, AWAIT_BACKUP, 0.6, wait=True)
        return False
    _advance(service, row, "trim", 0.9)
    return True


def _trim(service: Service, row: Operation, kek: str) -> bool:
    if row.floor is not None:
        if _below(service, row.tenant, row.floor):
            _advance(service, row, "rewrap", 0.2, floor=row.floor)
            return True
        service.wrapper.shred(kek, row.floor)
    with service.work(ACTOR, WORKER) as work:
        current = lookup.operation(work.session, row.tenant, row.id)
        steps.end(work, current, OperationStatus.SUCCEEDED)
        if row.floor is not None and row.floor > 1:
            _complete(work, row)
    return False


def _complete(work: Work, row: Operation) -> None:
    """Note on what was destroyed before the shredding that no backup opens it any more."""
    sure = work.now + timedelta(seconds=LONGEST_CLIENT_CACHE_S)
    for version in work.session.exec(
        select(KeyVersion).where(KeyVersion.tenant == row.tenant, KeyVersion.state == State.DESTROYED)
    ):
        if _still_open(version, sure):
            version.destroy_complete_after = sure
            version.row_version += 1
            version.updated_at = work.now
            work.session.add(version)
    work.record(row.tenant, "shred", "kek", floor=row.floor)


def _still_open(version: KeyVersion, sure: datetime) -> bool:
    return version.destroy_complete_after is not None and version.destroy_complete_after > sure


def _advance(
    service: Service,
    row: Operation,
    phase: str,
    progress: float,
    *,
    floor: int | None = None,
    wait: bool = False,
) -> None:
    with service.database.write(WORKER) as session:
        current = lookup.operation(session, row.tenant, row.id)
        if current.phase != row.phase or current.floor != row.floor:
            return  # another destruction has sent it back to the start
        if not wait:
            current.updated_at = service.clock()
        current.phase, current.progress = phase, progress
        current.floor = floor if floor is not None else current.floor
        if wait:
            current.next_attempt_at = service.clock() + timedelta(seconds=_WAIT_S)
        session.add(current)


def _below(service: Service, tenant: str, floor: int) -> list[OfTenant]:
    with service.database.read(WORKER) as session:
        old = col(KeyVersion.kek_version) < floor
        versions = session.exec(select(KeyVersion).where(KeyVersion.tenant == tenant, old).limit(BATCH))
        if found := versions.all():
            return list(found)
        older = col(Webhook.kek_version) < floor
        webhooks = session.exec(select(Webhook).where(Webhook.tenant == tenant, older).limit(BATCH))
        return list(webhooks.all())
