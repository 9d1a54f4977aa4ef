"""What one request cost: wait, time to the first token, time per further token, duration, tokens.

A process has one set of instruments, however many tenants it serves, and names at most
``SERVED`` of their models in labels: what comes later is counted under ``_OTHER``. Sums
over all labels stay right, and no number of tenants makes a process or a Prometheus grow.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal
from weakref import WeakKeyDictionary

from opentelemetry.metrics import Histogram, Meter

from anamorph.telemetry import names
from anamorph.telemetry.guard import OTHER, Value, clean
from anamorph.telemetry.traces import Phase

Protection = Literal["plaintext", "encrypted"]
Side = Literal["server", "client"]
OK = "ok"
SERVED = 100


def histogram(meter: Meter, name: str, unit: str, description: str) -> Histogram:
    """A histogram with the buckets that ``names.BUCKETS`` gives it."""
    return meter.create_histogram(
        name, unit, description, explicit_bucket_boundaries_advisory=names.BUCKETS.get(name)
    )


class Instruments:
    """What one process measures requests with: the instruments of one meter and side.

    Args:
        meter: ``Telemetry.meter``.
        side: see ``InferenceMetrics``.
        served: most (tenant, model) that have series of their own.
    """

    def __init__(self, meter: Meter, side: Side, served: int = SERVED) -> None:
        first, rest, total = _NAMES[side]
        self.first_token = histogram(meter, first, "s", "Time from the request to its first output token")
        self.per_token = histogram(meter, rest, "s", "Time per output token after the first")
        self.duration = histogram(meter, total, "s", "Time from the request to its last output token")
        self.queue = histogram(meter, names.SERVER_QUEUE_DURATION, "s", "Time until the engine computed")
        if side == "client":
            usage = histogram(meter, names.CLIENT_TOKEN_USAGE, "{token}", "Tokens read and written")
            self.count = usage.record
        else:
            self.count = meter.create_counter(names.SERVER_TOKENS, "{token}", "Tokens read and written").add
        self.active = meter.create_up_down_counter(
            names.SERVER_ACTIVE_REQUESTS.replace("server", side), "{request}", "Requests being answered"
        )
        self._served = served
        self._known: set[tuple[str, str]] = set()

    def label(self, tenant: str, model: str) -> tuple[str, str]:
        """``tenant`` and ``model`` as labels: as they are for the first that come, then ``_OTHER``.

        First come is not arbitrary: whoever sends more comes sooner. A label is never taken
        back, since a counter that changes its labels would count twice or not at all.
        """
        if (tenant, model) not in self._known:
            if len(self._known) >= self._served:
                return OTHER, OTHER
            self._known.add((tenant, model))
        return tenant, model


_instruments: WeakKeyDictionary[Meter, dict[Side, Instruments]] = WeakKeyDictionary()
_lock = threading.Lock()


def instruments(meter: Meter, side: Side) -> Instruments:
    """The instruments of a meter; the same at every call, since a second set would count apart."""
    with _lock:
        made = _instruments.setdefault(meter, {})
        if side not in made:
            made[side] = Instruments(meter, side)
        return made[side]


class InferenceMetrics:
    """Measures one endpoint: one (tenant, model) behind one kind of protection.

    Any number of these share the instruments of their meter.

    Args:
        meter: ``Telemetry.meter``.
        tenant: tenant id, or ``plaintext`` for the baseline.
        model: model id.
        protection: whether the endpoint computes on encrypted ids.
        side: ``server`` for engines, ``client`` for SDK and proxy; it chooses
            between ``gen_ai.server.*`` and ``gen_ai.client.*``.
        operation: ``gen_ai.operation.name`` of the requests.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        meter: Meter,
        tenant: str,
        model: str,
        protection: Protection,
        *,
        side: Side = "server",
        operation: str = "text_completion",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock = clock
        self.side = side
        self.instruments = instruments(meter, side)
        tenant, model = self.instruments.label(tenant, model)
        self.attributes: dict[str, Value] = clean(
            {
                names.OPERATION: operation,
                names.REQUEST_MODEL: model,
                names.TENANT: tenant,
                names.PROTECTION: protection,
            }
        )

    def start(self) -> RequestTimer:
        """Begin to time one request."""
        return RequestTimer(self)


_NAMES: dict[Side, tuple[str, str, str]] = {
    "server": (
        names.SERVER_TIME_TO_FIRST_TOKEN,
        names.SERVER_TIME_PER_OUTPUT_TOKEN,
        names.SERVER_REQUEST_DURATION,
    ),
    "client": (
        names.CLIENT_TIME_TO_FIRST_CHUNK,
        names.CLIENT_TIME_PER_OUTPUT_CHUNK,
        names.CLIENT_OPERATION_DURATION,
    ),
}


class RequestTimer:
    """Times one request; ``finish`` records it, once.

    ``token(n)`` reports that n output tokens arrived now, the first one
    included; ``first_token`` only marks the moment and is called by the first
    ``token``. Time per output token is (last − first) / (tokens − 1): it leaves
    the first token out, and is recorded only for two tokens or more.
    """

    def __init__(self, metrics: InferenceMetrics) -> None:
        self._metrics = metrics
        self._began = metrics.clock()
        self._computing: float | None = None
        self._first: float | None = None
        self._last: float | None = None
        self._tokens = 0
        self._finished = False
        metrics.instruments.active.add(1, metrics.attributes)

    def computing(self, at: float) -> None:
        """The engine began to compute then, by this timer's clock; of several sequences the first counts."""
        if self._computing is None or at < self._computing:
            self._computing = max(at, self._began)

    def first_token(self) -> None:
        """Mark the first output token, if none was marked yet."""
        if self._first is None:
            self._first = self._metrics.clock()

    def token(self, n: int = 1) -> None:
        """Count n output tokens that arrived now."""
        self.first_token()
        self._last = self._metrics.clock() if self._tokens else self._first
        self._tokens += n

    def finish(self, outcome: str = OK, *, input_tokens: int | None = None) -> None:
        """Record the request; later calls change nothing.

        Args:
            outcome: ``ok``, or one word for what went wrong (an error code or an
                exception's class name), which becomes ``error.type``.
            input_tokens: length of the prompt, where it is known.
        """
        if self._finished:
            return
        self._finished = True
        made, attributes = self._metrics.instruments, self._metrics.attributes
        made.active.add(-1, attributes)
        failed = {} if outcome == OK else {names.ERROR_TYPE: outcome}
        made.duration.record(self._metrics.clock() - self._began, clean({**attributes, **failed}))
        if self._computing is not None:
            made.queue.record(self._computing - self._began, attributes)
        self._record_tokens(input_tokens)

    def phases(self) -> tuple[Phase, ...]:
        """What has passed so far: ``queue`` where the engine says when it began, ``prefill``, ``decode``."""
        if self._first is None:
            return ()
        computing = self._began if self._computing is None else min(self._computing, self._first)
        queue = () if self._computing is None else (Phase("queue", self._began, computing),)
        last = self._first if self._last is None else self._last
        return *queue, Phase("prefill", computing, self._first), Phase("decode", self._first, last)

    def _record_tokens(self, input_tokens: int | None) -> None:
        made, attributes = self._metrics.instruments, self._metrics.attributes
        if self._first is not None:
            made.first_token.record(self._first - self._began, attributes)
            if self._last is not None and self._tokens > 1:
                made.per_token.record((self._last - self._first) / (self._tokens - 1), attributes)
        for kind, count in (("input", input_tokens), ("output", self._tokens)):
            if count:
                made.count(count, {**attributes, names.TOKEN_TYPE: kind})
