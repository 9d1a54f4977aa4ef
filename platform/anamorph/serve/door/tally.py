"""What the door knows of one version that it forwards to: how much is held, in flight, and served."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from anamorph.errors import TooManyRequests
from anamorph.wire.serving import Usage

# A replica that has left its device takes seconds to minutes to return.
RETRY_HELD_S = 5


class Held:
    """One request that waits for the first byte of its answer."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._waiting = True

    def begun(self) -> None:
        """The answer has begun, or never will; again changes nothing."""
        if self._waiting:
            self._waiting = False
            self._tally.held -= 1


class Tally:
    """Counters of one version.

    Args:
        source: name of this process in usage reports, unique per start.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._tokens = 0
        self.in_flight = 0
        self.held = 0

    @contextmanager
    def hold(self, most: int) -> Iterator[Held]:
        """Count one request, until it is answered.

        Raises:
            TooManyRequests: ``most`` already wait for the first byte of their answer.
        """
        if self.held >= most:
            raise TooManyRequests("too many requests wait", code="overloaded", retry_after=RETRY_HELD_S)
        self.held += 1
        self.in_flight += 1
        held = Held(self)
        try:
            yield held
        finally:
            held.begun()
            self.in_flight -= 1

    def count(self, tokens: int) -> None:
        self._tokens += tokens

    def usage(self) -> Usage:
        return Usage(source=self._source, tokens=self._tokens, in_flight=self.in_flight)
