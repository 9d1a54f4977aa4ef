"""One deadline for all that a request waits for: login, calls, retries, the database.

It travels in a context variable, which the framework hands on to its threads. Work
without a request, such as a background job, sets one of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from anamorph import errors

_ends_at: ContextVar[float | None] = ContextVar("anamorph_keysvc_deadline", default=None)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Everything in the block has ``seconds`` together; an earlier deadline around it stands."""
    ends_at = time.monotonic() + seconds
    outer = _ends_at.get()
    token = _ends_at.set(ends_at if outer is None else min(outer, ends_at))
    try:
        yield
    finally:
        _ends_at.reset(token)


def left(most: float) -> float:
    """Seconds that a call may take now: what is left of the deadline, ``most`` at most.

    Raises:
        Unavailable: nothing is left.
    """
    ends_at = _ends_at.get()
    if ends_at is None:
        return most
    remaining = ends_at - time.monotonic()
    if remaining <= 0:
        raise errors.Unavailable(
            "what the key service stands on did not answer in time", code="timeout", retry_after=5
        )
    return min(most, remaining)
