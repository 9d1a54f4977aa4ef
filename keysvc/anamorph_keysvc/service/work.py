"""What every service function is given: one transaction with its time, caller and tools."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar
from uuid import uuid4

from sqlmodel import Session

from anamorph import errors
from anamorph.wire.audit import Detail
from anamorph_keysvc import audit
from anamorph_keysvc.database import Database
from anamorph_keysvc.roots import RootCache
from anamorph_keysvc.scope import Scope
from anamorph_keysvc.settings import Limits
from anamorph_keysvc.signing import SigningKeys
from anamorph_keysvc.wrapper import KeyWrapper

Row = TypeVar("Row")

# Who the audit log names for what the service does by itself.
ACTOR = "service"


@dataclass(frozen=True)
class Work:
    """One write transaction. ``now`` stands still in it.

    It has no wrapper: nothing that may go over the network is done inside a transaction.
    """

    session: Session
    now: datetime
    actor: str
    entropy: Callable[[int], bytes]
    limits: Limits
    recorded: list[Callable[[], None]] = field(default_factory=list, repr=False)
    phases: list[tuple[str, float]] = field(default_factory=list, repr=False)
    """Phases of rotations that this transaction ends, with the seconds they took."""

    def record(self, tenant: str, action: str, subject: str, **detail: str | int | None) -> None:
        """Add a row to the tenant's audit log, when all else is done.

        Writers of one chain take turns by a lock: nobody may wait for anything else holding it.
        """
        kept: Detail = detail
        self.recorded.append(
            partial(
                audit.append,
                self.session,
                tenant=tenant,
                at=self.now,
                actor=self.actor,
                action=action,
                subject=subject,
                detail=kept,
            )
        )

    def fresh_id(self, prefix: str) -> str:
        """A new random id; later ones sort behind earlier ones."""
        milliseconds = int(self.now.timestamp() * 1000)
        return f"{prefix}_{milliseconds:012x}{self.entropy(10).hex()}"


def _unobserved(_phase: str, _seconds: float) -> None: ...


@dataclass(frozen=True)
class Service:
    """The running service: database and tools, everything passed in.

    ``woken`` tells the worker of this process that there is work; ``name`` is whom its
    leases belong to; ``phase`` hears how long a rotation was in a phase.
    """

    database: Database
    wrapper: KeyWrapper
    limits: Limits
    clock: Callable[[], datetime]
    entropy: Callable[[int], bytes]
    roots: RootCache = field(default_factory=RootCache)
    signing: SigningKeys = field(default_factory=SigningKeys)
    woken: threading.Event = field(default_factory=threading.Event)
    name: str = field(default_factory=lambda: f"keysvc-{uuid4().hex}")
    phase: Callable[[str, float], None] = _unobserved

    @contextmanager
    def work(self, actor: str, scope: Scope) -> Iterator[Work]:
        """A write transaction on behalf of ``actor``, which sees what ``scope`` admits."""
        with self.database.write(scope) as session:
            # The time is read inside the transaction, so that audit rows are in order.
            work = Work(session, self.clock(), actor, self.entropy, self.limits)
            yield work
            session.flush()
            for append in work.recorded:
                append()
        for phase, seconds in work.phases:
            self.phase(phase, seconds)


def utc_now() -> datetime:
    """The clock of a running service."""
    return datetime.now(UTC)


def found(row: Row | None, what: str) -> Row:
    """``row``, unless it is missing.

    Raises:
        NotFound: the same for what does not exist and what is another tenant's.
    """
    if row is None:
        raise errors.NotFound(f"no such {what}", code="not_found")
    return row
