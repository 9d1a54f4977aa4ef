"""What is read from the database to be shown as gauges: few queries, seldom, and never in the way.

A scrape gets the last sample. When that has become old, one thread takes another, and
the scrape that began it waits a moment for it; while the database hangs there is that
one thread, scrapes go on at once with what is known, and after a while with nothing.
Nothing here names a tenant: series per tenant would be a list of customers, and grow
with them. Who it is that a number speaks of, the API says to those who may ask.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import case
from sqlmodel import Session, col, func, select

from anamorph.wire.admin import OperationStatus
from anamorph.wire.states import State
from anamorph_keysvc import deadline
from anamorph_keysvc.database import Database
from anamorph_keysvc.scope import WORKER
from anamorph_keysvc.service.transition import PHASES, phase_of
from anamorph_keysvc.tables import (
    IN_FLIGHT,
    Audit,
    AuditCheckpoint,
    Delivery,
    KeyVersion,
    Operation,
    Tenant,
)

_READ_S = 3.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """The state of all tenants together; ages and delays in seconds, 0 where there is nothing.

    ``rotations`` is the age of the oldest unfinished rotation in each of ``PHASES``,
    ``overdue_s`` by how much the latest ACTIVE version outlived its policy, ``spent`` how
    many are over their token budget, ``waiting_s`` how long the longest-due operation has
    waited for a worker, ``uncovered_s`` the age of the oldest audit row that no exported
    checkpoint covers, ``drain_overdue_s`` by how much a DRAINING version outlived its grace.
    """

    versions: dict[State, int]
    oldest_s: float
    overdue_s: float
    spent: int
    rotations: dict[str, float]
    operations: dict[str, int]
    waiting_s: float
    deliveries: int
    delivery_waiting_s: float
    uncovered_s: float
    drain_overdue_s: float = 0.0


def take_sample(database: Database, now: datetime, *, checkpoints: bool = False) -> Sample:
    """Read a sample; ``uncovered_s``, which costs the most, only where there are ``checkpoints``.

    Raises:
        Unavailable: the database does not answer in time.
    """
    with deadline.within(_READ_S), database.read(WORKER) as session:
        oldest, rotate_at, spent = _active(session)
        waiting = _waiting(session)
        deliveries, delivery_due = _deliveries(session)
        return Sample(
            versions=_versions(session),
            oldest_s=_since(oldest, now),
            overdue_s=_since(rotate_at, now),
            spent=spent,
            rotations={phase: _since(began, now) for phase, began in _rotations(session).items()},
            operations=_operations(session),
            waiting_s=_since(waiting, now),
            deliveries=deliveries,
            delivery_waiting_s=_since(delivery_due, now),
            uncovered_s=_since(_uncovered(session), now) if checkpoints else 0,
            drain_overdue_s=_since(_draining(session), now),
        )


def _since(then: datetime | None, now: datetime) -> float:
    return 0.0 if then is None else max((now - then).total_seconds(), 0.0)


def _versions(session: Session) -> dict[State, int]:
    rows = session.exec(select(KeyVersion.state, func.count()).group_by(col(KeyVersion.state))).all()
    return {**dict.fromkeys(State, 0), **{State(state): count for state, count in rows}}


def _active(session: Session) -> tuple[datetime | None, datetime | None, int]:
    """Earliest activation and earliest due rotation of ACTIVE versions, and how many are over budget."""
    over = col(KeyVersion.served_tokens) >= col(KeyVersion.token_limit)
    # SUM of nothing is NULL, so that an empty table counts as 0 below.
    wanted: Any = select(
        func.min(KeyVersion.activated_at),
        func.min(KeyVersion.rotate_at),
        func.sum(case((over, 1), else_=0)),
    )
    oldest, due, spent = session.exec(wanted.where(KeyVersion.state == State.ACTIVE)).one()
    return oldest, due, int(spent or 0)


def _draining(session: Session) -> datetime | None:
    """When the grace of the DRAINING version that should have ended first was over."""
    return session.exec(
        select(func.min(KeyVersion.drain_until)).where(KeyVersion.state == State.DRAINING)
    ).one()


def _rotations(session: Session) -> dict[str, datetime | None]:
    """When the oldest unfinished rotation of each phase began."""
    prepared = col(KeyVersion.key_id).is_not(None)
    rows = session.exec(
        select(KeyVersion.state, prepared, func.min(KeyVersion.created_at))
        .where(col(KeyVersion.state).in_(IN_FLIGHT))
        .group_by(col(KeyVersion.state), prepared)
    ).all()
    found = {phase_of(State(state), prepared=bool(known)): began for state, known, began in rows}
    return {phase: found.get(phase) for phase in PHASES}


def _operations(session: Session) -> dict[str, int]:
    rows = session.exec(
        select(Operation.kind, func.count())
        .where(Operation.status == OperationStatus.RUNNING)
        .group_by(col(Operation.kind))
    ).all()
    return {"rotate": 0, "shred": 0, **dict(rows)}


def _waiting(session: Session) -> datetime | None:
    """When the longest-due operation was due."""
    return session.exec(
        select(func.min(Operation.next_attempt_at)).where(Operation.status == OperationStatus.RUNNING)
    ).one()


def _deliveries(session: Session) -> tuple[int, datetime | None]:
    """How many webhook deliveries wait, and when the longest-due one was due."""
    wanted: Any = select(func.count(), func.min(Delivery.next_attempt_at))
    count, due = session.exec(wanted.where(Delivery.status == "pending")).one()
    return count, due


def _uncovered(session: Session) -> datetime | None:
    """Time of the oldest audit row beyond its tenant's last exported checkpoint.

    Subqueries with LIMIT, so that PostgreSQL looks two rows up for each tenant: joined,
    it would read the whole audit log (measured: 450 ms for 500,000 rows, and growing).
    """
    covered = (
        select(AuditCheckpoint.sequence)
        .where(AuditCheckpoint.tenant == Tenant.id, col(AuditCheckpoint.exported_at).is_not(None))
        .order_by(col(AuditCheckpoint.sequence).desc())
        .limit(1)
        .correlate(Tenant)
        .scalar_subquery()
    )
    following = (
        select(Audit.at)
        .where(Audit.tenant == Tenant.id, col(Audit.sequence) > func.coalesce(covered, 0))
        .order_by(col(Audit.sequence))
        .limit(1)
        .correlate(Tenant)
        .scalar_subquery()
    )
    wanted: Any = select(func.min(following)).select_from(Tenant)
    oldest: datetime | None = session.exec(wanted).one()
    return oldest


class Sampler:
    """The last sample, taken anew when it is asked for and old.

    Args:
        take: reads a sample; may hang, may fail.
        every_s: least time between two readings.
        patience_s: how long the scrape that began a reading waits for it.
        keep_s: a sample older than this is not shown.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        take: Callable[[], Sample],
        *,
        every_s: float = 10,
        patience_s: float = 1,
        keep_s: float = 60,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._take, self._clock = take, clock
        self._every_s, self._patience_s, self._keep_s = every_s, patience_s, keep_s
        self._lock = threading.Lock()
        self._reader: threading.Thread | None = None
        self._begun_at = float("-inf")
        self._made_at = clock()
        self._last: tuple[float, Sample] | None = None

    def get(self) -> Sample | None:
        """The last sample, or nothing where it is too old."""
        reader = self._begin()
        if reader is not None:
            reader.join(self._patience_s)
        last = self._last
        return None if last is None or self._clock() - last[0] > self._keep_s else last[1]

    def age(self) -> float:
        """Seconds since the database answered the last time, or since the start if it never did."""
        last = self._last
        return self._clock() - (self._made_at if last is None else last[0])

    def _begin(self) -> threading.Thread | None:
        """The thread that this call has started, if the time for one had come."""
        with self._lock:
            busy = self._reader is not None and self._reader.is_alive()
            if busy or self._clock() - self._begun_at < self._every_s:
                return None
            self._begun_at = self._clock()
            # A daemon: a database that hangs must not keep the process from ending.
            self._reader = threading.Thread(target=self._read, name="keysvc-gauges", daemon=True)
            self._reader.start()
            return self._reader

    def _read(self) -> None:
        try:
            sample = self._take()
        except Exception as error:  # noqa: BLE001 -- its age tells that there is no new one
            _log.warning("the gauges could not be read: %s", type(error).__name__)
        else:
            self._last = (self._clock(), sample)
