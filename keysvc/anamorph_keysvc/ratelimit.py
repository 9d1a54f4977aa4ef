"""How often callers may call: per tenant by class of route, and per address where credentials fail.

The limits hold per process: with N processes behind a balancer a tenant has up to N
times as much. They keep one tenant from starving the others; they are no accounting.

The generic cell rate algorithm, rather than the memory storage of the ``limits`` package:
that one walks all its keys in a thread every 10 ms while it is used (measured: a third
of a core at 10,000 tenants with four classes each), and keeps as many keys as strangers make up.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from ipaddress import IPv6Address, ip_address, ip_network

from anamorph import errors
from anamorph_keysvc.credentials import Caller
from anamorph_keysvc.settings import Limits

Clock = Callable[[], float]

WINDOW_S = 60.0
MOST_KEYS = 65_536
_ROUNDING_S = 1e-6


class Kind(StrEnum):
    """Class of a route: what it costs, and so how often it may be called."""

    READ = "read"
    WRITE = "write"
    RELEASE = "release"
    ROTATE = "rotate"


def kind_of(method: str, path: str) -> Kind:
    """The class of a request."""
    if method in {"GET", "HEAD"}:
        return Kind.READ
    if path.endswith((":release", "/inference-tokens")):
        return Kind.RELEASE
    return Kind.ROTATE if path.endswith("/keys:rotate") else Kind.WRITE


class Buckets:
    """One bucket per key, each of ``per_minute`` tokens, which come back evenly over a minute.

    Args:
        most_keys: how many keys are remembered; the one used longest ago is forgotten first.
        clock: seconds, monotonic.
    """

    def __init__(self, per_minute: int, *, most_keys: int = MOST_KEYS, clock: Clock = time.monotonic) -> None:
        self._interval = WINDOW_S / per_minute
        self._most_keys = most_keys
        self._clock = clock
        self._full_at: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, key: str) -> float:
        """Take a token; answers 0, or the seconds after which there is one again."""
        with self._lock:
            now = self._clock()
            full_at = max(self._full_at.get(key, now), now) + self._interval
            missing = full_at - now - WINDOW_S
            if missing > _ROUNDING_S:
                return missing
            self._full_at[key] = full_at
            self._full_at.move_to_end(key)
            if len(self._full_at) > self._most_keys:
                self._full_at.popitem(last=False)
            return 0.0

    def wait(self, key: str) -> float:
        """What ``take`` would answer, without taking."""
        with self._lock:
            now = self._clock()
            missing = self._full_at.get(key, now) + self._interval - now - WINDOW_S
            return missing if missing > _ROUNDING_S else 0.0


class RateLimits:
    """The limits of one process."""

    def __init__(self, limits: Limits, *, clock: Clock = time.monotonic) -> None:
        rates = {
            Kind.READ: limits.reads_per_minute,
            Kind.WRITE: limits.writes_per_minute,
            Kind.RELEASE: limits.releases_per_minute,
            Kind.ROTATE: limits.rotations_per_minute,
        }
        self._buckets = {kind: Buckets(rate, clock=clock) for kind, rate in rates.items()}
        self._failures = Buckets(limits.failed_logins_per_minute, clock=clock)
        self._accepted = _Recent(MOST_KEYS)

    def check(self, caller: Caller, kind: Kind) -> None:
        """Count a request of a caller who has been authenticated.

        Tenants are counted as a whole, a grant by itself, since its job must not wait
        for the tenant's clients. The platform is not limited: it works for all tenants.

        Raises:
            TooManyRequests: too many of this kind in the last minute.
        """
        if caller.tenant is None:
            return
        key = caller.tenant if caller.grant is None else caller.actor
        wait = self._buckets[kind].take(key)
        if wait > 0:
            raise _too_many(f"too many requests of the kind '{kind}' for this tenant", wait)

    @contextmanager
    def attempt(self, address: str | None, authorization: str | None) -> Iterator[None]:
        """Count it against an address if the authentication in the block fails.

        While an address has too many failures, only credentials that were accepted before get
        through: callers behind one proxy share its address, and one of them may be guessing.

        A request without a credential guesses nothing, and costs nothing to refuse.

        Raises:
            TooManyRequests: too many failures from this address; the block is not run.
        """
        if authorization is None:
            yield
            return
        place = _network(address)
        credential = hashlib.sha256(authorization.encode()).digest()
        wait = self._failures.wait(place)
        if wait > 0 and credential not in self._accepted:
            raise _too_many("too many credentials from this address were refused", wait)
        try:
            yield
        except errors.Unauthenticated:
            self._accepted.discard(credential)
            self._failures.take(place)
            raise
        self._accepted.add(credential)


class _Recent:
    """A set of at most ``most`` digests; the one used longest ago goes first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._items: OrderedDict[bytes, None] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, item: bytes) -> bool:
        return item in self._items

    def add(self, item: bytes) -> None:
        with self._lock:
            self._items[item] = None
            self._items.move_to_end(item)
            if len(self._items) > self._most:
                self._items.popitem(last=False)

    def discard(self, item: bytes) -> None:
        with self._lock:
            self._items.pop(item, None)


def _network(address: str | None) -> str:
    """What one guesser has at least: an IPv4 address, or a /64 of IPv6."""
    try:
        parsed = ip_address(address or "")
    except ValueError:
        return "unknown"
    if isinstance(parsed, IPv6Address):
        return str(parsed.ipv4_mapped or ip_network((int(parsed) >> 64 << 64, 64)))
    return str(parsed)


def _too_many(what: str, wait: float) -> errors.TooManyRequests:
    return errors.TooManyRequests(
        f"{what}: come back later", code="rate_limited", retry_after=max(1, math.ceil(wait))
    )
