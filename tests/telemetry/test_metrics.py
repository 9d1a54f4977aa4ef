from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader

from anamorph.telemetry import InferenceMetrics, Telemetry, names

from .conftest import Clock


def points(reader: InMemoryMetricReader, name: str) -> list[Any]:
    data = reader.get_metrics_data()
    scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics] if data else []
    return [
        point
        for scope in scopes
        for metric in scope.metrics
        if metric.name == name
        for point in metric.data.data_points
    ]


def only(reader: InMemoryMetricReader, name: str) -> HistogramDataPoint:
    (point,) = points(reader, name)
    assert isinstance(point, HistogramDataPoint)
    return point


@pytest.fixture
def engine(measured: Telemetry, clock: Clock) -> InferenceMetrics:
    return InferenceMetrics(measured.meter, "acme", "smol", "encrypted", clock=clock)


def answer(engine: InferenceMetrics, clock: Clock, *gaps: float) -> None:
    timer = engine.start()
    for gap in gaps:
        clock.advance(gap)
        timer.token()
    timer.finish(input_tokens=7)


def test_time_to_first_token(engine: InferenceMetrics, clock: Clock, reader: InMemoryMetricReader) -> None:
    """Time to the first token is counted from the start of the request."""
    answer(engine, clock, 0.5, 0.1)
    assert only(reader, names.SERVER_TIME_TO_FIRST_TOKEN).sum == pytest.approx(0.5)


def test_tpot_excludes_first(engine: InferenceMetrics, clock: Clock, reader: InMemoryMetricReader) -> None:
    """Time per output token leaves the wait for the first token out."""
    answer(engine, clock, 9.0, 0.1, 0.3)
    assert only(reader, names.SERVER_TIME_PER_OUTPUT_TOKEN).sum == pytest.approx(0.2)


def test_one_token_has_no_tpot(engine: InferenceMetrics, clock: Clock, reader: InMemoryMetricReader) -> None:
    """An answer of one token says nothing about the time per further token."""
    answer(engine, clock, 0.5)
    assert points(reader, names.SERVER_TIME_PER_OUTPUT_TOKEN) == []


def test_tokens_in_batches(engine: InferenceMetrics, clock: Clock, reader: InMemoryMetricReader) -> None:
    """Tokens that arrive together count one by one; marking the first twice changes nothing."""
    timer = engine.start()
    timer.first_token()
    timer.token(2)
    clock.advance(0.9)
    timer.token(2)
    timer.finish()
    assert only(reader, names.SERVER_TIME_PER_OUTPUT_TOKEN).sum == pytest.approx(0.3)


def test_attributes(engine: InferenceMetrics, clock: Clock, reader: InMemoryMetricReader) -> None:
    """Every point says whom it concerns and whether the endpoint computes on encrypted ids."""
    answer(engine, clock, 0.5)
    assert dict(only(reader, names.SERVER_REQUEST_DURATION).attributes or {}) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "smol",
        "anamorph.tenant": "acme",
        "anamorph.protection": "encrypted",
    }


def test_error_type(engine: InferenceMetrics, reader: InMemoryMetricReader) -> None:
    """A failed request carries one word for its error; a message becomes _OTHER."""
    engine.start().finish("overloaded")
    engine.start().finish("token 17 of the prompt is out of range")
    seen = {
        (point.attributes or {}).get("error.type") for point in points(reader, names.SERVER_REQUEST_DURATION)
    }
    assert seen == {"overloaded", "_OTHER"}


def test_finish_once(engine: InferenceMetrics, reader: InMemoryMetricReader) -> None:
    """A request that is finished twice (answered, then its connection closed) counts once."""
    timer = engine.start()
    timer.finish("ok")
    timer.finish("CancelledError")
    assert only(reader, names.SERVER_REQUEST_DURATION).count == 1
    assert [point.value for point in points(reader, names.SERVER_ACTIVE_REQUESTS)] == [0]


def test_token_counts(engine: InferenceMetrics, clock: Clock, reader: InMemoryMetricReader) -> None:
    """Tokens read and written are counted apart."""
    answer(engine, clock, 0.1, 0.1)
    counted = {
        point.attributes["gen_ai.token.type"]: point.value for point in points(reader, names.SERVER_TOKENS)
    }
    assert counted == {"input": 7, "output": 2}


def test_client_side(measured: Telemetry, clock: Clock, reader: InMemoryMetricReader) -> None:
    """The client's side records under the conventions' client names, token usage included."""
    client = InferenceMetrics(
        measured.meter, "acme", "smol", "encrypted", side="client", operation="chat", clock=clock
    )
    answer(client, clock, 0.5, 0.1)
    assert only(reader, "gen_ai.client.operation.duration").sum == pytest.approx(0.6)
    assert {point.sum for point in points(reader, "gen_ai.client.token.usage")} == {7, 2}


@pytest.mark.parametrize(
    ("name", "first", "last", "count"),
    [
        (names.SERVER_TIME_TO_FIRST_TOKEN, 0.001, 10, 16),
        (names.SERVER_TIME_PER_OUTPUT_TOKEN, 0.01, 2.5, 13),
        (names.SERVER_REQUEST_DURATION, 0.01, 81.92, 14),
    ],
)
def test_buckets(
    engine: InferenceMetrics,
    clock: Clock,
    reader: InMemoryMetricReader,
    name: str,
    first: float,
    last: float,
    count: int,
) -> None:
    """Histograms have the buckets that the conventions recommend."""
    answer(engine, clock, 0.5, 0.1)
    bounds = only(reader, name).explicit_bounds
    assert (bounds[0], bounds[-1], len(bounds)) == (first, last, count)
