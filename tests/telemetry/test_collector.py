"""Into a real OpenTelemetry collector and out of its exporters."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.servers.otelcol import Collector, running_otelcol

from anamorph import telemetry
from anamorph.telemetry import InferenceMetrics, Telemetry

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def collector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collector]:
    with running_otelcol(tmp_path_factory.mktemp("otelcol")) as running:
        yield running


def serve(built: Telemetry, tenant: str = "acme") -> None:
    timer = InferenceMetrics(built.meter, tenant, "smol", "encrypted").start()
    with built.tracer.start_as_current_span("text_completion") as span:
        timer.computing(0)
        timer.token(2)
        timer.finish(input_tokens=3)
        telemetry.traces.record_phases(built.tracer, span, timer.phases(), timer._metrics.clock())


def families(page: str) -> dict[str, set[str]]:
    """Names of series with their labels."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_the_names_are_those_of_the_page(collector: Collector) -> None:
    """What is pushed comes out under the names and labels that ``/metrics`` of the process has."""
    built = telemetry.setup("svc", otlp_endpoint=collector.url)
    serve(built)
    page = families(built.prometheus().decode())
    built.shutdown()
    pushed = families(collector.wait(lambda c: _with(c, 'job="svc"')))
    assert page.keys() - pushed.keys() == set()
    assert [name for name, labels in page.items() if not labels <= pushed[name]] == []


def _with(collector: Collector, text: str) -> str:
    page = collector.metrics()
    return page if text in page else ""


def test_two_processes_of_one_service_are_two(collector: Collector) -> None:
    """Each has an instance of its own, so that a collector does not take one's series for the other's."""
    for _ in range(2):
        built = telemetry.setup("twice", otlp_endpoint=collector.url)
        serve(built)
        built.shutdown()
    name = "gen_ai_server_request_duration_seconds_count"

    def both(c: Collector) -> list[str]:
        lines = [line for line in c.metrics().splitlines() if line.startswith(name) and 'job="twice"' in line]
        return lines if len(lines) == 2 else []

    assert all(line.endswith(" 1") for line in collector.wait(both))


def test_phases_arrive_below_their_request(collector: Collector) -> None:
    """Queue, prefill and decode of one trace, as the file exporter wrote them down."""
    built = telemetry.setup("phases", otlp_endpoint=collector.url)
    serve(built)
    built.shutdown()
    spans = collector.wait(lambda c: [span for span in c.spans() if span.service == "phases"])
    (request,) = [span for span in spans if span.name == "text_completion"]
    below = {span.name for span in spans if span.parent == request.id}
    assert below == {"queue", "prefill", "decode"}
    assert {span.trace for span in spans} == {request.trace}


def test_a_collector_that_is_away_harms_nobody() -> None:
    """Requests are answered and recorded, and the end does not wait for it."""
    built = telemetry.setup("lonely", otlp_endpoint="http://127.0.0.1:9")
    serve(built)
    assert b"gen_ai_server_request_duration_seconds_count" in built.prometheus()
    built.shutdown()
