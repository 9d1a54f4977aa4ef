"""The door as telemetry sees it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.types import Receive, Scope, Send

from anamorph import telemetry
from anamorph.serve.asgi.answers import JSON
from anamorph.serve.door.observed import Observed

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "tracestate": "vendor=patient-42"}


class Behind:
    """What stands behind: notes the headers it gets, and answers 404."""

    fails = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        if self.fails:
            raise RuntimeError("quoting a prompt")
        await JSON({"error": {}}, 404)(scope, receive, send)


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def observed(spans: InMemorySpanExporter) -> Iterator[telemetry.Telemetry]:
    built = telemetry.build("door-test", span_processors=[SimpleSpanProcessor(spans)])
    yield built
    built.shutdown()


async def ask(behind: Behind, observed: telemetry.Telemetry, path: str = "/acme/smol/v1/v1/models") -> int:
    transport = httpx.ASGITransport(Observed(behind, observed), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://door") as http:
        return (await http.get(path, headers=CALLER)).status_code


async def test_the_engine_is_called_by_the_door(
    observed: telemetry.Telemetry, spans: InMemorySpanExporter
) -> None:
    """The caller's trace goes on, with the door's span in between; ``tracestate`` ends here."""
    behind = Behind()
    assert await ask(behind, observed) == 404
    (span,) = spans.get_finished_spans()
    assert span.context is not None
    assert behind.headers["traceparent"] == f"00-{TRACE}-{span.context.span_id:016x}-01"
    assert "tracestate" not in behind.headers
    assert dict(span.attributes or {}) == {"http.request.method": "GET", "http.response.status_code": 404}


async def test_the_time_until_an_answer_began(observed: telemetry.Telemetry) -> None:
    """By method and status; no tenant, of whom the door has more than a process should have series."""
    await ask(Behind(), observed)
    page = observed.prometheus().decode()
    assert 'anamorph_door_answer_duration_seconds_count{http_request_method="GET"' in page
    assert "acme" not in page


async def test_answers_that_break_off_are_counted(observed: telemetry.Telemetry) -> None:
    """By why, from zero on: an alert looks for an increase."""
    door = Observed(Behind(), observed)
    assert broken(observed) == {"timeout": 0, "unavailable": 0}
    door.broke("timeout")
    assert broken(observed) == {"timeout": 1, "unavailable": 0}


def broken(observed: telemetry.Telemetry) -> dict[str, float]:
    page = observed.prometheus().decode()
    found = re.findall(r'^anamorph_door_broken_total\{.*error_type="(\w+)".*\} (\S+)$', page, re.MULTILINE)
    return {code: float(count) for code, count in found}


async def test_failures_keep_their_words(observed: telemetry.Telemetry, spans: InMemorySpanExporter) -> None:
    """A fault is marked by its class, and says nothing."""
    behind = Behind()
    behind.fails = True
    assert await ask(behind, observed) == 500
    (span,) = spans.get_finished_spans()
    assert (span.attributes or {})["error.type"] == "RuntimeError"
    assert "quoting" not in span.to_json()


async def test_probes_are_not_traced(observed: telemetry.Telemetry, spans: InMemorySpanExporter) -> None:
    """Ray and Kubernetes ask for health all the time."""
    await ask(Behind(), observed, "/healthz")
    assert spans.get_finished_spans() == ()
