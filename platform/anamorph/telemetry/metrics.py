"""What one request cost: time to the first token, time per further token, duration, tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from opentelemetry.metrics import Histogram, Meter

from anamorph.telemetry import names
from anamorph.telemetry.guard import Value, clean

Protection = Literal["plaintext", "encrypted"]
Side = Literal["server", "client"]
OK = "ok"


def histogram(meter: Meter, name: str, unit: str, description: str) -> Histogram:
    """A histogram with the buckets that ``names.BUCKETS`` gives it."""
    return meter.create_histogram(
        name, unit, description, explicit_bucket_boundaries_advisory=names.BUCKETS.get(name)
    )


class InferenceMetrics:
    """Instruments of one endpoint: one (tenant, model) behind one kind of protection.

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
        first, rest, total = _NAMES[side]
        self.clock = clock
        self.side = side
        self.attributes: dict[str, Value] = clean(
            {
                names.OPERATION: operation,
                names.REQUEST_MODEL: model,
                names.TENANT: tenant,
                names.PROTECTION: protection,
            }
        )
        self.first_token = histogram(meter, first, "s", "Time from the request to its first output token")
        self.per_token = histogram(meter, rest, "s", "Time per output token after the first")
        self.duration = histogram(meter, total, "s", "Time from the request to its last output token")
        if side == "client":
            usage = histogram(meter, names.CLIENT_TOKEN_USAGE, "{token}", "Tokens read and written")
            self.count = usage.record
        else:
            self.count = meter.create_counter(names.SERVER_TOKENS, "{token}", "Tokens read and written").add
        self.active = meter.create_up_down_counter(
            names.SERVER_ACTIVE_REQUESTS.replace("server", side), "{request}", "Requests being answered"
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
        self._first: float | None = None
        self._last: float | None = None
        self._tokens = 0
        self._finished = False
        metrics.active.add(1, metrics.attributes)

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
        metrics, took = self._metrics, self._metrics.clock() - self._began
        metrics.active.add(-1, metrics.attributes)
        failed = {} if outcome == OK else {names.ERROR_TYPE: outcome}
        metrics.duration.record(took, clean({**metrics.attributes, **failed}))
        self._record_tokens(input_tokens)

    def _record_tokens(self, input_tokens: int | None) -> None:
        metrics = self._metrics
        if self._first is not None:
            metrics.first_token.record(self._first - self._began, metrics.attributes)
            if self._last is not None and self._tokens > 1:
                per_token = (self._last - self._first) / (self._tokens - 1)
                metrics.per_token.record(per_token, metrics.attributes)
        for kind, count in (("input", input_tokens), ("output", self._tokens)):
            if count:
                metrics.count(count, {**metrics.attributes, names.TOKEN_TYPE: kind})
