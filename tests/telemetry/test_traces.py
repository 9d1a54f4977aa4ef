from __future__ import annotations

import time

import httpx
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from anamorph import telemetry
from anamorph.serve.engines.coldstart import ColdStart
from anamorph.telemetry import Telemetry, traces
from anamorph.telemetry.traces import Phase

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


def test_phases_lie_in_their_request(measured: Telemetry, spans: InMemorySpanExporter) -> None:
    """Queue, prefill and decode follow each other without a gap, at the times at which they happened."""
    now = time.perf_counter()
    phases = [Phase("queue", now - 3, now - 2), Phase("prefill", now - 2, now - 1.5)]
    with measured.tracer.start_as_current_span("request") as request:
        traces.record_phases(measured.tracer, request, phases, now)
    queue, prefill, parent = spans.get_finished_spans()
    assert parent.context is not None
    assert [one.parent.span_id for one in (queue, prefill) if one.parent] == [parent.context.span_id] * 2
    assert queue.end_time == prefill.start_time
    assert abs((queue.end_time or 0) - (time.time_ns() - 2e9)) < 5e9


def test_phases_of_an_unsampled_request(spans: InMemorySpanExporter) -> None:
    """Who is not sampled pays for no spans."""
    built = telemetry.build("quiet", span_processors=[SimpleSpanProcessor(spans)])
    parent = built.tracer.start_span("request", context=traces.extract({"traceparent": PARENT[:-1] + "0"}))
    traces.record_phases(built.tracer, parent, [Phase("queue", 1, 2)], 3)
    built.shutdown()
    assert spans.get_finished_spans() == ()


@pytest.mark.parametrize(("ratio", "caller", "kept"), [("0", None, 0), ("0", PARENT, 1), ("1", None, 1)])
def test_sampling(
    monkeypatch: pytest.MonkeyPatch, spans: InMemorySpanExporter, ratio: str, caller: str | None, kept: int
) -> None:
    """OpenTelemetry's own variables choose the share of traces; a caller who keeps his is followed."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", ratio)
    built = telemetry.build("svc", span_processors=[SimpleSpanProcessor(spans)])
    headers = {} if caller is None else {"traceparent": caller}
    built.tracer.start_span("request", context=traces.extract(headers)).end()
    built.shutdown()
    assert len(spans.get_finished_spans()) == kept


def test_a_start_is_a_trace_of_its_own(measured: Telemetry, spans: InMemorySpanExporter) -> None:
    """From the store to a loaded engine: one span for the whole, one for each phase."""
    start = ColdStart()
    for phase in ("fetch", "verify", "load"):
        with start.phase(phase):
            pass
    start.trace(measured.tracer, {"gen_ai.request.model": "smol"})
    *phases, whole = spans.get_finished_spans()
    assert ([phase.name for phase in phases], whole.name) == (["fetch", "verify", "load"], "engine start")
    assert (whole.start_time, whole.end_time) == (phases[0].start_time, phases[-1].end_time)
    assert whole.parent is None


def test_a_start_without_phases_is_none(measured: Telemetry, spans: InMemorySpanExporter) -> None:
    """An engine without files has nothing to tell."""
    ColdStart().trace(measured.tracer, {})
    assert spans.get_finished_spans() == ()
