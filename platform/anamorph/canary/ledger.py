"""What the canary remembers while it runs, and shows as metrics. Nothing of it is kept on disk."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from statistics import median

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from anamorph.canary.drift import Drift
from anamorph.canary.loaded import Served
from anamorph.canary.report import MEASURES
from anamorph.canary.window import LEAST_PAIRS, Pair, Window, by_length
from anamorph.telemetry import clean, names
from anamorph.telemetry.guard import Value

_log = logging.getLogger(__name__)
_TIMES = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class Kept:
    """One version's pairs, and the drift alarms of its model, which outlive the version."""

    served: Served
    window: Window
    drifts: dict[str, Drift]


class Ledger:
    """Pairs of every version that is measured. The exporter's thread reads while the canary's writes.

    Args:
        seconds, most: of each version's ``Window``.
        drift: makes the alarm of one measure of one model.
    """

    def __init__(self, seconds: float, most: int, drift: Callable[[], Drift] = Drift) -> None:
        self._seconds, self._most, self._drift = seconds, most, drift
        self._kept: dict[Served, Kept] = {}
        self._lock = threading.Lock()

    def keep(self, served: Collection[Served]) -> None:
        """Measure these from now on; what is known of others is forgotten, and their series end."""
        with self._lock:
            drifts = {(one.tenant, one.model): kept.drifts for one, kept in self._kept.items()}
            self._kept = {
                one: self._kept.get(one) or self._begin(one, drifts.get((one.tenant, one.model)))
                for one in served
            }

    def _begin(self, served: Served, drifts: dict[str, Drift] | None) -> Kept:
        made = drifts or {measure: self._drift() for measure in MEASURES}
        return Kept(served, Window(self._seconds, self._most), made)

    def record(self, served: Served, pair: Pair) -> None:
        """Add a pair of a version that is kept."""
        with self._lock:
            kept = self._kept[served]
            kept.window.add(pair)
            for measure, drift in kept.drifts.items():
                before = drift.drifting
                drift.add(pair.ratio(measure))
                if drift.drifting and not before:
                    _log.warning("%s of %s/%s changed", measure, served.tenant, served.model)

    def expire(self, now: float) -> None:
        """Drop what is too old."""
        with self._lock:
            for kept in self._kept.values():
                kept.window.expire(now)

    def kept(self) -> tuple[Kept, ...]:
        """Every version that is measured."""
        with self._lock:
            return tuple(self._kept.values())


def show(ledger: Ledger, meter: Meter) -> None:
    """Register the gauges of ``names.OVERHEAD_*``; a version without enough pairs has no ratio yet."""

    def gauge(name: str, unit: str, text: str, read: Callable[[Ledger], Iterator[Observation]]) -> None:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            return read(ledger)

        meter.create_observable_gauge(name, [observe], unit, text)

    gauge(names.OVERHEAD_RATIO, "1", "Encrypted over plaintext, measured by the canary", _ratios)
    gauge(names.OVERHEAD_LENGTH_RATIO, "1", "The same by prompt length, all versions together", _by_length)
    gauge(names.OVERHEAD_LATENCY, "s", "Median of what the canary's requests took", _latencies)
    gauge(names.OVERHEAD_PAIRS, "{pair}", "Pairs that the ratio is made of", _pairs)
    # Without a unit: Prometheus' names would get one for "1" as well.
    gauge(names.OVERHEAD_DRIFT, "", "1 where the ratio has changed against its own history", _drifts)


def _ratios(ledger: Ledger) -> Iterator[Observation]:
    for kept in ledger.kept():
        for measure, ratio in kept.window.now.ratios.items():
            for statistic, value in asdict(ratio).items():
                marks = clean({names.MEASURE: measure, names.STATISTIC: statistic})
                yield Observation(value, _of(kept.served) | marks)


def _by_length(ledger: Ledger) -> Iterator[Observation]:
    for length, pairs in by_length(kept.window for kept in ledger.kept()).items():
        for measure, ratio in pairs.ratios.items():
            for statistic, value in asdict(ratio).items():
                marks = {names.LENGTH: length, names.MEASURE: measure, names.STATISTIC: statistic}
                yield Observation(value, clean(marks))


def _latencies(ledger: Ledger) -> Iterator[Observation]:
    for kept in ledger.kept():
        pairs = kept.window.now.pairs
        if len(pairs) < LEAST_PAIRS:
            continue
        for measure in _TIMES:
            for side in ("encrypted", "plaintext"):
                value = median(getattr(getattr(pair, side), measure) for pair in pairs)
                yield Observation(value, _of(kept.served) | {names.MEASURE: measure, names.PROTECTION: side})


def _pairs(ledger: Ledger) -> Iterator[Observation]:
    for kept in ledger.kept():
        yield Observation(len(kept.window.now.pairs), _of(kept.served))


def _drifts(ledger: Ledger) -> Iterator[Observation]:
    for kept in ledger.kept():
        for measure, drift in kept.drifts.items():
            yield Observation(int(drift.drifting), _of(kept.served) | {names.MEASURE: measure})


def _of(served: Served) -> dict[str, Value]:
    return clean(
        {names.TENANT: served.tenant, names.REQUEST_MODEL: served.model, names.VERSION: served.version}
    )
