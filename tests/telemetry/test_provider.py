from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry import metrics, trace
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from anamorph import telemetry
from anamorph.telemetry import InferenceMetrics


class Collector(ThreadingHTTPServer):
    """An OTLP/HTTP endpoint that keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: dict[str, list[bytes]] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Collector)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.setdefault(self.path, []).append(body)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_setup_is_idempotent() -> None:
    """The same arguments give the same object until it is shut down, then a new one."""
    first = telemetry.setup("svc")
    assert telemetry.setup("svc") is first
    first.shutdown()
    second = telemetry.setup("svc")
    assert second is not first
    second.shutdown()


def test_two_services_do_not_mix() -> None:
    """Two services in one process have pages of their own."""
    one, two = telemetry.build("one"), telemetry.build("two")
    one.meter.create_counter("seen").add(1)
    assert b"seen" in one.prometheus()
    assert b"seen" not in two.prometheus()
    one.shutdown()
    two.shutdown()


def test_nothing_global() -> None:
    """Setting up leaves OpenTelemetry's global providers as they were."""
    before = (trace.get_tracer_provider(), metrics.get_meter_provider())
    telemetry.build("quiet").shutdown()
    assert (trace.get_tracer_provider(), metrics.get_meter_provider()) == before


def test_prometheus_page_parses() -> None:
    """The page is valid in Prometheus' text format, and again after further requests."""
    built = telemetry.build("svc")
    engine = InferenceMetrics(built.meter, "acme", "smol", "encrypted")
    for _ in range(2):
        timer = engine.start()
        timer.token(2)
        timer.finish(input_tokens=3)
    families = {family.name: family for family in text_string_to_metric_families(built.prometheus().decode())}
    counts = [
        sample.value
        for sample in families["gen_ai_server_request_duration_seconds"].samples
        if sample.name.endswith("_count")
    ]
    assert counts == [2.0]
    assert built.prometheus() == built.prometheus()
    built.shutdown()


def test_otlp_export(collector: Collector) -> None:
    """With an endpoint, spans and metrics arrive there at the latest on shutdown, resource named."""
    built = telemetry.setup(
        "svc", otlp_endpoint=collector.url, resource={"service.instance.id": "a", "prompt": "no"}
    )
    with built.tracer.start_as_current_span("request"):
        built.meter.create_counter("seen").add(3)
    built.shutdown()
    spans = ExportTraceServiceRequest.FromString(collector.received["/v1/traces"][0])
    numbers = ExportMetricsServiceRequest.FromString(collector.received["/v1/metrics"][0])
    assert spans.resource_spans[0].scope_spans[0].spans[0].name == "request"
    assert numbers.resource_metrics[0].scope_metrics[0].metrics[0].name == "seen"
    told = {item.key: item.value.string_value for item in spans.resource_spans[0].resource.attributes}
    assert (told["service.name"], told["service.instance.id"], "prompt" in told) == ("svc", "a", False)
