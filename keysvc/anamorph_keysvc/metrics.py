"""What the key service counts and measures of itself; never ids of tenants' objects, never credentials.

Durations are in seconds. Where something can fail, ``error.type`` is the word for how it
did, and is absent where it went well. ``docs/observability.md`` explains every metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from opentelemetry.metrics import CallbackOptions, Counter, Histogram, Meter, Observation
from sqlalchemy.pool import QueuePool

from anamorph.telemetry import names
from anamorph_keysvc.database import Database
from anamorph_keysvc.gauges import Sample, Sampler, take_sample
from anamorph_keysvc.service.work import utc_now

# The targets of a release, 20 and 100 ms, and of a request that fails, 3.5 s, are bounds.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 3.5, 5, 10)
_PHASE_SECONDS = (1, 5, 15, 60, 300, 900, 1800, 3600, 2 * 3600, 4 * 3600, 8 * 3600, 24 * 3600)
_IDENTITIES = ("issuer", "releaser", "shredder")


@dataclass(frozen=True)
class Metrics:
    """The instruments that code records with; gauges read themselves."""

    requests: Histogram
    releases: Counter
    release_duration: Histogram
    denials: Counter
    release_failures: Counter
    calls: Histogram
    kms_attempts: Counter
    kms_logins: Counter
    rotation_phases: Histogram
    rounds: Counter


def build_metrics(
    meter: Meter,
    database: Database,
    *,
    clock: Callable[[], datetime] = utc_now,
    checkpoints: bool = False,
    sampler: Sampler | None = None,
) -> Metrics:
    """Register all instruments.

    Args:
        meter: ``Telemetry.meter``.
        database: whose state the gauges show.
        clock: the service's clock, which its rows were written by.
        checkpoints: whether audit chains are checkpointed, so that a lag means something.
        sampler: what reads the gauges; one over ``database`` by default.
    """
    sampler = sampler or Sampler(lambda: take_sample(database, clock(), checkpoints=checkpoints))
    _register_gauges(meter, sampler, checkpoints=checkpoints)
    _register_pool(meter, database)
    metrics = Metrics(
        requests=_seconds(meter, "request.duration", "Requests by route and status"),
        releases=meter.create_counter("anamorph.keysvc.releases", description="Key material released"),
        release_duration=_seconds(meter, "release.duration", "Releases, by whether the KMS was asked"),
        denials=meter.create_counter("anamorph.keysvc.denials", description="Releases refused"),
        release_failures=meter.create_counter(
            "anamorph.keysvc.release.failures", description="Releases that could not be answered"
        ),
        calls=_seconds(meter, "call.duration", "Calls of what the service stands on"),
        kms_attempts=meter.create_counter(
            "anamorph.keysvc.kms.attempts", description="Requests to the KMS, repeated ones included"
        ),
        kms_logins=meter.create_counter(
            "anamorph.keysvc.kms.logins", description="Logins and token renewals at the KMS"
        ),
        rotation_phases=_seconds(
            meter, "rotation.phase.duration", "Time that rotations spent in a phase", _PHASE_SECONDS
        ),
        rounds=meter.create_counter("anamorph.keysvc.worker.rounds", description="Rounds of background jobs"),
    )
    _begin_at_zero(metrics)
    return metrics


def _seconds(meter: Meter, name: str, description: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
    return meter.create_histogram(
        f"anamorph.keysvc.{name}", "s", description, explicit_bucket_boundaries_advisory=list(buckets)
    )


def _begin_at_zero(metrics: Metrics) -> None:
    # Prometheus sees no increase where a series begins at 1.
    for counter in (metrics.denials, metrics.release_failures, metrics.rounds):
        counter.add(0)
    for purpose in ("client", "materialize"):
        metrics.releases.add(0, {names.PURPOSE: purpose})
    for identity in _IDENTITIES:
        for action in ("login", "renew"):
            metrics.kms_logins.add(0, {names.ACTION: action, names.IDENTITY: identity})


Read = Callable[[Sample], Iterable[Observation]]


def _register_gauges(meter: Meter, sampler: Sampler, *, checkpoints: bool) -> None:
    def gauge(name: str, unit: str, description: str, read: Read) -> None:
        def observe(_options: CallbackOptions) -> Iterable[Observation]:
            sample = sampler.get()
            return [] if sample is None else read(sample)

        meter.create_observable_gauge(
            f"anamorph.keysvc.{name}", callbacks=[observe], unit=unit, description=description
        )

    gauge("versions", "", "Key versions by state", lambda s: _by(names.STATE, s.versions))
    gauge("key.oldest", "s", "Age of the oldest ACTIVE version", lambda s: _one(s.oldest_s))
    gauge("key.overdue", "s", "Longest time past a due rotation", lambda s: _one(s.overdue_s))
    gauge("drain.overdue", "s", "Longest time past the end of a drain", lambda s: _one(s.drain_overdue_s))
    gauge("key.spent", "", "ACTIVE versions over their token budget", lambda s: _one(s.spent))
    gauge("rotation.age", "s", "Oldest rotation in each phase", lambda s: _by(names.PHASE, s.rotations))
    gauge("operations", "", "Operations that are running", lambda s: _by(names.KIND, s.operations))
    gauge("operation.waiting", "s", "Longest wait for a worker", lambda s: _one(s.waiting_s))
    gauge("deliveries", "", "Webhook deliveries that wait", lambda s: _one(s.deliveries))
    gauge("delivery.waiting", "s", "Longest-due webhook delivery", lambda s: _one(s.delivery_waiting_s))
    if checkpoints:
        gauge("audit.uncovered", "s", "Oldest row without a checkpoint", lambda s: _one(s.uncovered_s))
    meter.create_observable_gauge(
        "anamorph.keysvc.sample.age",
        callbacks=[lambda _: _one(sampler.age())],
        unit="s",
        description="Time since the database was last read for these gauges",
    )


def _one(value: float) -> list[Observation]:
    return [Observation(value)]


def _by(name: str, values: Mapping[Any, float]) -> list[Observation]:
    return [Observation(value, {name: str(key)}) for key, value in values.items()]


def _register_pool(meter: Meter, database: Database) -> None:
    def used(_options: CallbackOptions) -> Iterable[Observation]:
        pool = database.engine.pool
        return _one(pool.checkedout()) if isinstance(pool, QueuePool) else []

    def most(_options: CallbackOptions) -> Iterable[Observation]:
        pool = database.engine.pool
        # The overflow has no public name.
        return _one(pool.size() + pool._max_overflow) if isinstance(pool, QueuePool) else []

    meter.create_observable_gauge(
        "anamorph.keysvc.database.connections", callbacks=[used], description="Connections in use"
    )
    meter.create_observable_gauge(
        "anamorph.keysvc.database.connections.limit", callbacks=[most], description="Most connections"
    )
