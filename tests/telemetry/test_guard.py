from __future__ import annotations

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from anamorph.errors import BadRequest
from anamorph.telemetry import Telemetry, clean
from anamorph.telemetry.guard import ALLOWED

CANARY = "fluffy"


@pytest.mark.parametrize(
    "name", ["prompt", "gen_ai.input.messages", "gen_ai.output.messages", "token_ids", "user"]
)
def test_unlisted_names_drop(name: str) -> None:
    """An attribute that nobody put on the list does not leave the process."""
    assert clean({name: "x", "anamorph.tenant": "acme"}) == {"anamorph.tenant": "acme"}


@pytest.mark.parametrize("name", sorted(ALLOWED))
@pytest.mark.parametrize(
    "value", ["what is my diagnosis?", "17 4 99", "17,4,99", "[17]", "x" * 161, "", "a\nb"]
)
def test_no_listed_name_carries_text(name: str, value: str) -> None:
    """Under no listed name does a sentence or a list of ids pass."""
    assert clean({name: value}) == {name: "_OTHER"}


@pytest.mark.parametrize("name", sorted(ALLOWED))
@pytest.mark.parametrize("value", [[17, 4], (17,), b"key", {"a": 1}, None])
def test_no_listed_name_carries_lists(name: str, value: object) -> None:
    """Lists, bytes and objects are dropped under every name."""
    assert clean({name: value}) == {}


def test_list_itself() -> None:
    """No name on the list is one that the conventions give to content."""
    content = (
        "message",
        "prompt",
        "completion",
        "instruction",
        "tool",
        "text",
        "content",
        "header",
        "body",
        "query",
    )
    assert [name for name in ALLOWED if any(word in name for word in content)] == []


def test_metrics_are_guarded(measured: Telemetry, reader: InMemoryMetricReader) -> None:
    """An instrument that anyone creates keeps listed attributes only, exemplars included."""
    with measured.tracer.start_as_current_span("request"):
        measured.meter.create_counter("mine").add(1, {"prompt": CANARY, "anamorph.tenant": "acme"})
        measured.meter.create_histogram("mine.too").record(1, {"prompt": CANARY})
    data = reader.get_metrics_data()
    assert data is not None
    assert CANARY not in data.to_json()
    assert b"acme" in measured.prometheus()
    assert CANARY.encode() not in measured.prometheus()


def test_spans_are_guarded(measured: Telemetry, spans: InMemorySpanExporter) -> None:
    """Attributes, events, and the messages and stack traces of exceptions stay inside."""
    with measured.tracer.start_as_current_span("POST /v1/completions") as span:
        span.set_attributes({"prompt": CANARY, "anamorph.tenant": "acme", "http.route": f"a {CANARY} b"})
        span.add_event(CANARY, {"prompt": CANARY})
        span.record_exception(BadRequest(f"could not read {CANARY}"))
    (seen,) = spans.get_finished_spans()
    assert CANARY not in seen.to_json()
    assert dict(seen.attributes or {}) == {"anamorph.tenant": "acme", "http.route": "_OTHER"}
    assert [dict(event.attributes or {}) for event in seen.events] == [
        {},
        {"exception.type": "anamorph.errors.BadRequest"},
    ]


def test_span_names(measured: Telemetry, spans: InMemorySpanExporter) -> None:
    """A span's name that does not look like one is replaced."""
    measured.tracer.start_span("chat smol").end()
    measured.tracer.start_span("what's my diagnosis, doctor?").end()
    assert [span.name for span in spans.get_finished_spans()] == ["chat smol", "_OTHER"]


def test_status_survives_without_words(measured: Telemetry, spans: InMemorySpanExporter) -> None:
    """A failed span is still seen to have failed."""
    with pytest.raises(BadRequest), measured.tracer.start_as_current_span("request"):
        raise BadRequest(CANARY)
    (seen,) = spans.get_finished_spans()
    assert (seen.status.status_code.name, seen.status.description) == ("ERROR", None)
