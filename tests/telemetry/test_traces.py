from __future__ import annotations

import httpx
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from anamorph.telemetry import Telemetry, traces

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    "headers", [{"traceparent": PARENT}, {"TraceParent": PARENT}, httpx.Headers({"TRACEPARENT": PARENT})]
)
def test_joins_the_callers_trace(
    measured: Telemetry, spans: InMemorySpanExporter, headers: dict[str, str]
) -> None:
    """A span started in the extracted context belongs to the caller's trace, however the header is spelt."""
    with measured.tracer.start_as_current_span(
        "request", context=traces.extract(headers), kind=SpanKind.SERVER
    ):
        pass
    (seen,) = spans.get_finished_spans()
    assert seen.parent is not None
    assert format(seen.parent.trace_id, "032x") == "0af7651916cd43dd8448eb211c80319c"
    assert format(seen.parent.span_id, "016x") == "b7ad6b7169203331"


def test_from_proxy_to_engine(measured: Telemetry, spans: InMemorySpanExporter) -> None:
    """What one process injects, the next one extracts: the two spans are parent and child."""
    headers: dict[str, str] = {}
    with measured.tracer.start_as_current_span("proxy"):
        traces.inject(headers)
    measured.tracer.start_span("engine", context=traces.extract(headers)).end()
    proxy, engine = spans.get_finished_spans()
    sent, arrived = proxy.get_span_context(), engine.parent
    assert sent is not None
    assert arrived is not None
    assert (arrived.trace_id, arrived.span_id) == (sent.trace_id, sent.span_id)


def test_only_traceparent_crosses(measured: Telemetry) -> None:
    """Neither tracestate nor baggage of the caller is carried on."""
    arriving = {"traceparent": PARENT, "tracestate": "vendor=secret", "baggage": "patient=42"}
    leaving: dict[str, str] = {}
    with measured.tracer.start_as_current_span("proxy", context=traces.extract(arriving)):
        traces.inject(leaving)
    assert list(leaving) == ["traceparent"]


@pytest.mark.parametrize("value", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "0" * 600])
def test_malformed_parent(measured: Telemetry, spans: InMemorySpanExporter, value: str) -> None:
    """A malformed header starts a new trace instead of failing the request."""
    measured.tracer.start_span("request", context=traces.extract({"traceparent": value})).end()
    (seen,) = spans.get_finished_spans()
    assert seen.parent is None


def test_nothing_to_inject() -> None:
    """Outside any span no header is added."""
    headers: dict[str, str] = {}
    traces.inject(headers)
    assert headers == {}
