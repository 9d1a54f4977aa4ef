"""What every service function is given: one transaction with its time, caller and tools."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

from sqlmodel import Session

from anamorph import errors
from anamorph.wire.audit import Detail
from anamorph_keysvc import audit
from anamorph_keysvc.database import Database
from anamorph_keysvc.settings import Limits
from anamorph_keysvc.wrapper import KeyWrapper

Row = TypeVar("Row")


@dataclass(frozen=True)
class Work:
    """One write transaction. ``now`` stands still in it."""

    session: Session
    now: datetime
    actor: str
    wrapper: KeyWrapper
    entropy: Callable[[int], bytes]
    limits: Limits

    def record(self, tenant: str, action: str, subject: str, **detail: str | int | None) -> None:
        """Add a row to the tenant's audit log."""
        kept: Detail = detail
        audit.append(
            self.session,
            tenant=tenant,
            at=self.now,
            actor=self.actor,
            action=action,
            subject=subject,
            detail=kept,
        )

    def fresh_id(self, prefix: str) -> str:
        """A new random id."""
        return f"{prefix}_{self.entropy(12).hex()}"


@dataclass(frozen=True)
class Service:
    """The running service: database and tools, everything passed in."""

    database: Database
    wrapper: KeyWrapper
    limits: Limits
    clock: Callable[[], datetime]
    entropy: Callable[[int], bytes]

    @contextmanager
    def work(self, actor: str) -> Iterator[Work]:
        """A write transaction on behalf of ``actor``."""
        with self.database.write() as session:
            # The time is read inside the transaction, so that audit rows are in order.
            yield Work(session, self.clock(), actor, self.wrapper, self.entropy, self.limits)


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
