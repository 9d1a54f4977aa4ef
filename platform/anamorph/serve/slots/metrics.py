"""What a pool tells of itself: swaps, hits, memory, members, and who waits.

Who waits is told under the labels of ``InferenceMetrics``, which name a bounded number of
models and sum up the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from anamorph.telemetry import names
from anamorph.telemetry.guard import Value, clean
from anamorph.telemetry.metrics import histogram


class Observed(Protocol):
    """What a pool can be asked at any time."""

    def waiting(self) -> Mapping[str, int]:
        """Queued sequences by key id, of those that have some."""
        ...

    def labels(self, key_id: str) -> Mapping[str, Value]:
        """Tenant and model of a key id as labels."""
        ...

    def states(self) -> Counter[str]:
        """Members by state."""
        ...

    def resident_bytes(self) -> int:
        """Bytes of replicas in host memory."""
        ...


class PoolMetrics:
    """Instruments of one pool.

    Args:
        meter: ``Telemetry.meter``.
        pool: its name.
    """

    def __init__(self, meter: Meter, pool: str) -> None:
        self._meter = meter
        self._pool = clean({names.POOL: pool})
        self._duration = histogram(meter, names.POOL_SWAP_DURATION, "s", "Time to copy a replica into a slot")
        self._copied = meter.create_counter(names.POOL_SWAP_BYTES, "By", "Bytes copied into slots")
        self._requests = meter.create_counter(
            names.POOL_REQUESTS, "{sequence}", "Sequences that found their replica in a slot, or did not"
        )

    def swapped(self, seconds: float, copied: int) -> None:
        """A replica was copied into a slot."""
        self._duration.record(seconds, self._pool)
        self._copied.add(copied, self._pool)

    def requested(self, *, hit: bool) -> None:
        """A sequence arrived; ``hit``: its replica was in a slot."""
        self._requests.add(1, {**self._pool, names.STATE: "hit" if hit else "miss"})

    def observe(self, observed: Observed) -> None:
        """Tell of a pool at every collection from now on."""
        gauges: tuple[tuple[str, str, Callable[[Observed], Iterator[Observation]]], ...] = (
            (names.POOL_WAITING, "{sequence}", self._waiting),
            (names.POOL_MEMBERS, "{member}", self._members),
            (names.POOL_HOST_BYTES, "By", self._resident),
        )
        for name, unit, read in gauges:
            self._meter.create_observable_gauge(name, [_Gauge(observed, read)], unit)

    def _waiting(self, observed: Observed) -> Iterator[Observation]:
        counts: Counter[tuple[tuple[str, Value], ...]] = Counter()
        for key_id, count in observed.waiting().items():
            counts[tuple(observed.labels(key_id).items())] += count
        for labels, count in counts.items():
            yield Observation(count, {**self._pool, **dict(labels)})

    def _members(self, observed: Observed) -> Iterator[Observation]:
        for state, count in observed.states().items():
            yield Observation(count, {**self._pool, names.STATE: state})

    def _resident(self, observed: Observed) -> Iterator[Observation]:
        yield Observation(observed.resident_bytes(), self._pool)


class _Gauge:
    def __init__(self, observed: Observed, read: Callable[[Observed], Iterator[Observation]]) -> None:
        self._observed = observed
        self._read = read

    def __call__(self, _: CallbackOptions) -> Iterator[Observation]:
        return self._read(self._observed)
