"""Public keys that are kept for a while and fetched again, by one thread at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
import jwt

from anamorph import errors
from anamorph_keysvc import deadline

_log = logging.getLogger(__name__)

Keys = dict[tuple[str, str], jwt.PyJWK]
"""By key id and algorithm: a key serves the algorithms that fit its type, and no other."""


class KeyCache:
    """Keys that are fetched again when they are old, or when a caller names one that is not there.

    One fetch runs at a time, in a thread of its own, so that no caller waits longer than its
    deadline; and one starts per interval at most, so that made-up key ids cannot flood an issuer.
    Times in seconds.

    Args:
        fetch: gets all keys, or raises Unavailable, HTTPError, InvalidURL or OSError.
        ttl: how long keys are good.
        stale: how much longer, while fetching fails.
        interval: the least time between the starts of two fetches.
        patience: how long a caller waits for one.
    """

    def __init__(
        self,
        fetch: Callable[[], Keys],
        *,
        ttl: float,
        stale: float,
        interval: float,
        patience: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch = fetch
        self._ttl, self._stale, self._interval, self._patience = ttl, stale, interval, patience
        self._clock = clock
        self._lock = threading.Lock()
        self._keys: Keys = {}
        self._fetched_at = self._tried_at = float("-inf")
        self._flight: _Flight | None = None

    def key(self, kid: str, algorithm: str) -> jwt.PyJWK | None:
        """The key to verify with, or None where the issuer has no such key.

        Raises:
            Unavailable: the issuer does not answer, and no key of it that is still good has this id.
        """
        if self._age() > self._ttl:
            self._refresh()
        found = self._usable().get((kid, algorithm))
        if found is None and self._refresh():
            found = self._usable().get((kid, algorithm))
        if found is None and self._tried_at > self._fetched_at:
            raise _unavailable()  # the key may be a new one, which we could not fetch
        return found

    def close(self) -> None:
        """Wait for a fetch that is under way; its own timeout bounds it."""
        flight = self._flight
        if flight is not None:
            flight.thread.join(2 * self._patience)

    def _age(self) -> float:
        return self._clock() - self._fetched_at

    def _usable(self) -> Keys:
        if self._age() > self._ttl + self._stale:
            raise _unavailable()
        return self._keys

    def _refresh(self) -> bool:
        """Wait for a fetch, started here or before; False if the last one is too recent."""
        patience = deadline.left(self._patience)
        with self._lock:
            flight = self._flight
            if flight is None:
                if self._clock() - self._tried_at < self._interval:
                    return False
                flight = self._take_off()
        flight.landed.wait(patience)
        return True

    def _take_off(self) -> _Flight:
        self._tried_at = self._clock()
        thread = threading.Thread(target=self._fly, name="anamorph-jwks", daemon=True)
        self._flight = _Flight(thread)
        thread.start()
        return self._flight

    def _fly(self) -> None:
        try:
            keys = self._fetch()
        except (errors.Unavailable, httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            # A URL of the settings may stand in it, nothing that a caller sent.
            _log.warning("an issuer's keys were not fetched: %s: %s", type(error).__name__, error)
        else:
            self._keys, self._fetched_at = keys, self._clock()
        finally:
            with self._lock:
                flight, self._flight = self._flight, None
            if flight is not None:
                flight.landed.set()


def _unavailable() -> errors.Unavailable:
    return errors.Unavailable(
        "the issuer of this token does not answer: try again", code="issuer_unavailable", retry_after=5
    )


@dataclass
class _Flight:
    """A fetch under way."""

    thread: threading.Thread
    landed: threading.Event = field(default_factory=threading.Event)
