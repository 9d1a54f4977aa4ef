"""W3C trace context across processes: ``traceparent``, and nothing else.

``tracestate`` and ``baggage`` are free text of whoever calls the proxy. They
would cross from the tenant's zone into the compute zone, so they are neither
sent nor read.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_HEADER = "traceparent"
_propagator = TraceContextTextMapPropagator()


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
