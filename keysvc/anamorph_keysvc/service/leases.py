"""Leases on operations: which process is at one, and when another may take over."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from sqlalchemy import or_, update
from sqlmodel import col, select

from anamorph import errors
from anamorph.wire.admin import OperationStatus
from anamorph_keysvc import deadline
from anamorph_keysvc.scope import WORKER
from anamorph_keysvc.service.work import Service
from anamorph_keysvc.tables import Operation

LEASE_S = 15
# What a deadline around a lease leaves after the work: a lease not given back runs out only later.
GIVE_BACK_S = 1.0
_LONGEST_BACKOFF_S = 10.0
_CHECK_S = 5.0


def due(service: Service, kind: str, *, most: int = 50) -> list[str]:
    """Ids of operations whose next step is the worker's, and now; longest due first.

    Raises:
        Unavailable: the database or the key-management service does not answer. A process that is
            cut off leaves all to others, and does not lengthen their backoff.
    """
    now = service.clock()
    with service.database.read(WORKER) as session:
        found = list(
            session.exec(
                select(Operation.id)
                .where(
                    Operation.kind == kind,
                    Operation.status == OperationStatus.RUNNING,
                    col(Operation.next_attempt_at) <= now,
                    or_(col(Operation.leased_until).is_(None), col(Operation.leased_until) < now),
                )
                .order_by(col(Operation.next_attempt_at))
                .limit(most)
            )
        )
    if found:
        with deadline.within(_CHECK_S):
            service.wrapper.check()
    return found


@contextmanager
def leased(service: Service, operation: str) -> Iterator[bool]:
    """Whether this process has the operation for the block, which ``extend``s the lease if it is long.

    What the block cannot do now (``Unavailable``) is tried again later, here or elsewhere,
    and any other error as well: the lease ends with a backoff, and the error goes on.
    """
    if not _take(service, operation):
        yield False
        return
    try:
        yield True
    except BaseException as error:
        _give_back(service, operation, failed=True, reason=_reason(error))
        raise
    _give_back(service, operation, failed=False, reason=None)


def extend(service: Service, operation: str) -> None:
    """Begin the lease anew: for work that is longer than one, after each part of it.

    Raises:
        Conflict: it ran out, and another process has the operation.
    """
    with service.database.write(WORKER) as session:
        statement = (
            update(Operation)
            .where(col(Operation.id) == operation, col(Operation.leased_by) == service.name)
            .values(leased_until=service.clock() + timedelta(seconds=LEASE_S))
            .execution_options(synchronize_session=False)
        )
        if session.exec(statement).rowcount != 1:
            raise errors.Conflict("another process works on this operation by now", code="lease_lost")


def _take(service: Service, operation: str) -> bool:
    with service.database.write(WORKER) as session:
        now = service.clock()
        statement = (
            update(Operation)
            .where(
                col(Operation.id) == operation,
                col(Operation.status) == OperationStatus.RUNNING,
                col(Operation.next_attempt_at) <= now,
                or_(col(Operation.leased_until).is_(None), col(Operation.leased_until) < now),
            )
            .values(leased_by=service.name, leased_until=now + timedelta(seconds=LEASE_S))
            .execution_options(synchronize_session=False)
        )
        return bool(session.exec(statement).rowcount == 1)


def _give_back(service: Service, operation: str, *, failed: bool, reason: str | None) -> None:
    try:
        with service.database.write(WORKER) as session:
            row = session.get(Operation, operation, with_for_update=True)
            if row is None or row.leased_by != service.name:
                return
            row.leased_by = row.leased_until = None
            if failed:
                row.attempts += 1
                row.next_attempt_at = service.clock() + timedelta(seconds=_backoff(row.attempts))
                row.error = reason
            else:
                row.attempts, row.error = 0, None
            session.add(row)
    except errors.Unavailable:
        pass  # the lease runs out by itself


def _backoff(attempts: int) -> float:
    """Doubling from half a second; short at its longest, so that work resumes soon after an outage."""
    longest: float = min(_LONGEST_BACKOFF_S, 0.5 * 2.0 ** min(attempts, 10))
    return longest * random.uniform(0.5, 1)  # noqa: S311 -- spreads retries, keeps no secret


def _reason(error: BaseException) -> str:
    code = getattr(error, "code", None)
    return code if isinstance(code, str) else type(error).__name__
