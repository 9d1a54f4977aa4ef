"""Idempotency keys: the same request sent twice is done once.

The answer is stored in the transaction that did the work, so after a crash there
is either both or neither. Only successful answers are stored, for a failed
request has changed nothing. Answers that contain a secret are never stored: such
routes refuse the header.

While a request works under a key, another under it is told to come back: within a
process by ``InFlight``, before it takes a connection; between processes, of which only
PostgreSQL has several, by an advisory lock that ends with the transaction.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

from pydantic import BaseModel
from sqlalchemy import delete, func, select
from sqlmodel import Session, col

from anamorph import errors
from anamorph_keysvc.scope import WORKER
from anamorph_keysvc.service.work import ACTOR, Service, Work
from anamorph_keysvc.tables import Answer

T = TypeVar("T", bound=BaseModel)

_KEY = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True)
class InFlight:
    """Idempotency keys that a request is working under at this moment."""

    _keys: set[tuple[str, str]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def hold(self, actor: str, key: str) -> Iterator[None]:
        """Hold a key for the length of a request.

        Raises:
            Conflict: another request holds it.
        """
        with self._lock:
            if (actor, key) in self._keys:
                raise _still_running()
            self._keys.add((actor, key))
        try:
            yield
        finally:
            with self._lock:
                self._keys.discard((actor, key))


def check_key(key: str) -> str:
    """An Idempotency-Key as it came in.

    Raises:
        BadRequest: empty, too long, or not printable ASCII.
    """
    if not _KEY.fullmatch(key):
        raise errors.BadRequest(
            "an Idempotency-Key is 1 to 128 printable characters without blanks",
            code="invalid_idempotency_key",
        )
    return key


def digest(*parts: bytes) -> str:
    """What tells one request from another under the same key."""
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "big") + part for part in parts)).hexdigest()


def once(work: Work, key: str, request_digest: str, answer: type[T], action: Callable[[Work], T]) -> T:
    """Do ``action``, or repeat what it answered before.

    Raises:
        Conflict: another process holds the key.
        Unprocessable: the key was used for another request.
    """
    # Tried before the look-up: an answer that comes in between would be missed, and done again.
    ours = _try_lock(work.session, work.actor, key)
    stored = work.session.get(Answer, (work.actor, key))
    if stored is not None:
        if stored.request_digest != request_digest:
            raise errors.Unprocessable(
                "this Idempotency-Key was used for another request", code="idempotency_key_reused"
            )
        return answer.model_validate_json(stored.body)
    if not ours:
        raise _still_running()
    result = action(work)
    work.session.add(
        Answer(
            actor=work.actor,
            key=key,
            tenant=work.session.info["scope"].tenant,
            request_digest=request_digest,
            body=result.model_dump_json(),
            created_at=work.now,
        )
    )
    return result


def _try_lock(session: Session, actor: str, key: str) -> bool:
    """Whether nobody else works under the key; if so, nobody will until this transaction ends.

    Not waited for: whoever waits would keep a connection that the first may need.
    """
    if session.get_bind().dialect.name != "postgresql":
        return True
    name = bytes.fromhex(digest(actor.encode(), key.encode()))
    lock = func.pg_try_advisory_xact_lock(int.from_bytes(name[:8], signed=True))
    # It names no row, so it passes by what narrows a tenant's session.
    return bool(session.connection().scalar(select(lock)))


def _still_running() -> errors.Conflict:
    return errors.Conflict(
        "a request under this Idempotency-Key is still running", code="request_in_flight", retry_after=1
    )


def forget_old(service: Service) -> None:
    """Delete stored answers past their time."""
    with service.work(ACTOR, WORKER) as work:
        oldest = work.now - timedelta(seconds=service.limits.idempotency_ttl_s)
        work.session.exec(delete(Answer).where(col(Answer.created_at) < oldest))
