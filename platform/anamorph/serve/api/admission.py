"""The bounded queue: sequences that are let in, and what they add up to."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from anamorph.errors import TooManyRequests
from anamorph.wire.serving import Usage


class Admission:
    """Counts sequences in flight and tokens served by this process.

    Args:
        places: sequences that may be queued or computed at once; further requests get 429.
        source: name of this process in usage reports, unique per start.
        retry_after: seconds after which a refused request may come again.
    """

    def __init__(
        self, places: int, source: str | None = None, *, retry_after: Callable[[], float] = lambda: 1
    ) -> None:
        self._places = places
        self._retry_after = retry_after
        self._source = source or uuid.uuid4().hex
        self._sequences = 0
        self._requests = 0
        self._tokens = 0

    @contextmanager
    def admit(self, sequences: int) -> Iterator[None]:
        """Hold places for one request.

        Raises:
            TooManyRequests: they are taken.
        """
        if self._sequences + sequences > self._places:
            raise TooManyRequests("the queue is full", code="overloaded", retry_after=self._retry_after())
        self._sequences += sequences
        self._requests += 1
        try:
            yield
        finally:
            self._sequences -= sequences
            self._requests -= 1

    def count(self, tokens: int) -> None:
        """Add ids that crossed the wire, in either direction: that is what a token budget bounds."""
        self._tokens += tokens

    def usage(self) -> Usage:
        return Usage(source=self._source, tokens=self._tokens, in_flight=self._requests)
