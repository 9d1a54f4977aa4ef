"""What the proxy records of its requests."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from anamorph import telemetry
from anamorph.client.proxy.answers import Delta
from anamorph.client.proxy.timed import Events, timed
from anamorph.errors import StreamInterrupted
from anamorph.telemetry import InferenceMetrics
from anamorph.wire.inference import CompletionUsage

USAGE = CompletionUsage(prompt_tokens=4, completion_tokens=3, total_tokens=7)


@pytest.fixture
def reader() -> InMemoryMetricReader:
    return InMemoryMetricReader()


@pytest.fixture
def metrics(reader: InMemoryMetricReader) -> Iterator[InferenceMetrics]:
    built = telemetry.build("proxy-test", metric_readers=[reader])
    yield InferenceMetrics(built.meter, "acme", "smol", "encrypted", side="client", operation="chat")
    built.shutdown()


async def answering(*, fails: bool = False) -> AsyncGenerator[Delta | CompletionUsage]:
    for _ in range(3):
        yield Delta(0, "x")
    if fails:
        raise StreamInterrupted("it broke off")
    yield USAGE


async def read(events: Events) -> int:
    return len([one async for one in events])


def recorded(reader: InMemoryMetricReader, name: str) -> list[tuple[str | None, float]]:
    """Error type and sum of each series of a histogram."""
    data = reader.get_metrics_data()
    assert data is not None
    metrics = [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics if m.name == name]
    points = [point for metric in metrics for point in metric.data.data_points]
    return [((point.attributes or {}).get("error.type"), point.sum) for point in points]  # type: ignore[misc, union-attr]


async def test_an_answer(metrics: InferenceMetrics, reader: InMemoryMetricReader) -> None:
    """Events pass as they are; duration, first chunk and tokens are recorded under client names."""
    assert await read(timed(answering(), metrics)) == 4
    assert [kind for kind, _ in recorded(reader, "gen_ai.client.operation.duration")] == [None]
    assert len(recorded(reader, "gen_ai.client.operation.time_to_first_chunk")) == 1
    assert {tokens for _, tokens in recorded(reader, "gen_ai.client.token.usage")} == {4, 3}


async def test_a_failure(metrics: InferenceMetrics, reader: InMemoryMetricReader) -> None:
    """By the class of what went wrong."""
    with pytest.raises(StreamInterrupted):
        await read(timed(answering(fails=True), metrics))
    kinds = [kind for kind, _ in recorded(reader, "gen_ai.client.operation.duration")]
    assert kinds == ["StreamInterrupted"]


async def test_a_caller_who_hangs_up(metrics: InferenceMetrics, reader: InMemoryMetricReader) -> None:
    """Closed in the middle it is recorded as cancelled, and upstream is closed."""
    upstream = answering()
    events = timed(upstream, metrics)
    await anext(events)
    await events.aclose()
    assert [kind for kind, _ in recorded(reader, "gen_ai.client.operation.duration")] == ["cancelled"]
    with pytest.raises(StopAsyncIteration):
        await anext(upstream)
