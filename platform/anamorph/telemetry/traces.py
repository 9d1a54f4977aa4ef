"""W3C trace context across processes: ``traceparent``, and nothing else.

``tracestate`` and ``baggage`` are free text of whoever calls the proxy. They
would cross from the tenant's zone into the compute zone, so they are neither
sent nor read.

Which traces are kept is OpenTelemetry's own setting, ``OTEL_TRACES_SAMPLER`` with
``OTEL_TRACES_SAMPLER_ARG``; a caller's decision, in the header, is followed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from anamorph.telemetry import names

_HEADER = "traceparent"
_propagator = TraceContextTextMapPropagator()


@dataclass(frozen=True)
class Phase:
    """A part of a request that has passed: seconds of the same clock as its request's."""

    name: str
    began: float
    ended: float


def record_phases(tracer: Tracer, parent: Span, phases: Iterable[Phase], now: float) -> None:
    """Write phases that are over as spans below ``parent``; nothing where it is not sampled.

    Args:
        tracer: of the process.
        parent: span of the request, ended or not.
        phases: what happened when.
        now: what their clock says at this moment.
    """
    _below(tracer, parent, phases, _Epoch(now))


def record(
    tracer: Tracer, name: str, phases: Sequence[Phase], now: float, attributes: Mapping[str, AttributeValue]
) -> None:
    """Write something that is over, and its phases, as a trace of its own; see ``record_phases``."""
    if not phases:
        return
    epoch = _Epoch(now)
    whole = tracer.start_span(
        name, Context(), attributes=attributes, start_time=epoch.ns(min(phase.began for phase in phases))
    )
    _below(tracer, whole, phases, epoch)
    whole.end(epoch.ns(max(phase.ended for phase in phases)))


def _below(tracer: Tracer, parent: Span, phases: Iterable[Phase], epoch: _Epoch) -> None:
    if not parent.get_span_context().trace_flags.sampled:
        return
    context = set_span_in_context(parent)
    for phase in phases:
        tracer.start_span(phase.name, context, start_time=epoch.ns(phase.began)).end(epoch.ns(phase.ended))


class _Epoch:
    """Turns seconds of a monotonic clock, which says ``now``, into nanoseconds since 1970."""

    def __init__(self, now: float) -> None:
        self._offset = time.time_ns() - int(now * 1e9)

    def ns(self, moment: float) -> int:
        return int(moment * 1e9) + self._offset


@contextmanager
def span(
    tracer: Tracer,
    name: str,
    *,
    context: Context | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Mapping[str, AttributeValue] | None = None,
) -> Iterator[Span]:
    """A span around a block, current within it; of an error it keeps the class name alone."""
    with tracer.start_as_current_span(
        name, context, kind, attributes, record_exception=False, set_status_on_exception=False
    ) as started:
        try:
            yield started
        except BaseException as error:
            started.set_attribute(names.ERROR_TYPE, type(error).__name__)
            started.set_status(Status(StatusCode.ERROR))
            raise


def inject(headers: MutableMapping[str, str], context: Context | None = None) -> None:
    """Add ``traceparent`` of the current (or given) span to outgoing headers, if there is one."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, context)
    if _HEADER in carrier:
        headers[_HEADER] = carrier[_HEADER]


def extract(headers: Mapping[str, str]) -> Context:
    """The caller's trace context; an empty one where the header is absent or malformed.

    Header names match in any case. Pass the result as ``context=`` to
    ``tracer.start_as_current_span``.
    """
    for name, value in headers.items():
        if name.lower() == _HEADER:
            return _propagator.extract({_HEADER: value}, Context())
    return Context()
