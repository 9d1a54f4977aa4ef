"""However many tenants there are, a process and a Prometheus keep their size."""

from __future__ import annotations

import tracemalloc

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client.parser import text_string_to_metric_families

from anamorph.telemetry import InferenceMetrics, Telemetry, names
from anamorph.telemetry.metrics import SERVED
from anamorph.telemetry.provider import SERIES_LIMIT

from .test_metrics import points

TENANTS = 10_000


def serve(measured: Telemetry, tenants: range) -> None:
    for number in tenants:
        timer = InferenceMetrics(measured.meter, f"t{number}", "smol", "encrypted").start()
        timer.computing(0)
        timer.token(2)
        timer.finish(input_tokens=3)


def series(measured: Telemetry) -> list[str]:
    page = measured.prometheus().decode()
    return [sample.name for family in text_string_to_metric_families(page) for sample in family.samples]


@pytest.fixture
def crowded(measured: Telemetry) -> Telemetry:
    serve(measured, range(TENANTS))
    return measured


def test_named_tenants_are_bounded(crowded: Telemetry, reader: InMemoryMetricReader) -> None:
    """The first hundred have series of their own, all others share one, and every request is counted."""
    found = points(reader, names.SERVER_REQUEST_DURATION)
    counts = {point.attributes[names.TENANT]: point.count for point in found}
    assert len(counts) == SERVED + 1
    assert counts["t0"] == 1
    assert counts["_OTHER"] == TENANTS - SERVED
    assert f"t{TENANTS - 1}" not in crowded.prometheus().decode()


def test_series_are_bounded(crowded: Telemetry) -> None:
    """About ninety for each name; ten thousand tenants make as many as a hundred and one do."""
    before = len(series(crowded))
    serve(crowded, range(TENANTS, 2 * TENANTS))
    assert len(series(crowded)) == before
    assert before < 100 * (SERVED + 1)


def test_memory_is_bounded(crowded: Telemetry) -> None:
    """Ten thousand further tenants leave nothing behind."""
    tracemalloc.start()
    try:
        serve(crowded, range(TENANTS, TENANTS + 100))
        before, _ = tracemalloc.get_traced_memory()
        serve(crowded, range(TENANTS + 100, 2 * TENANTS))
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 100_000


def test_whatever_else_explodes_ends_in_one_series(measured: Telemetry) -> None:
    """An attribute that takes ever new values fills its instrument's series and then one that says so."""
    counter = measured.meter.create_counter("mine")
    for number in range(3 * SERIES_LIMIT):
        counter.add(1, {names.ERROR_TYPE: f"e{number}"})
    found = [line for line in measured.prometheus().decode().splitlines() if line.startswith("mine_total")]
    assert len(found) == SERIES_LIMIT + 1
    assert sum(float(line.rpartition(" ")[2]) for line in found) == 3 * SERIES_LIMIT
    assert any('otel_metric_overflow="true"' in line for line in found)


def test_one_set_of_instruments(measured: Telemetry, caplog: pytest.LogCaptureFixture) -> None:
    """Endpoints of one process share their instruments; nothing is registered twice."""
    one, two = (InferenceMetrics(measured.meter, tenant, "m", "encrypted") for tenant in ("a", "b"))
    assert one.instruments is two.instruments
    assert caplog.text == ""
