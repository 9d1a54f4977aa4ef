"""The OpenTelemetry collector: OTLP in; a file of spans, a file of metrics and a Prometheus page out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from tests.servers.find import binary
from tests.servers.process import Program, free_port

PATIENCE_S = 60.0


@dataclass(frozen=True)
class Span:
    """One span as the collector wrote it down."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    began: int
    ended: int
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Collector:
    """A running collector.

    Args:
        url: OTLP over HTTP.
        page: URL of the Prometheus exporter.
        folder: with ``traces.jsonl``.
    """

    url: str
    page: str
    folder: Path

    def text(self) -> str:
        """Every span and metric that arrived, as the collector wrote them to its files."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.jsonl")))

    def spans(self) -> list[Span]:
        """All spans so far."""
        whole, _, _being_written = (self.folder / "traces.jsonl").read_text().rpartition("\n")
        return [span for line in whole.splitlines() for span in _spans(json.loads(line))]

    def metrics(self) -> str:
        """The page as Prometheus would scrape it."""
        return httpx.get(self.page, timeout=30).text

    def wait(self, condition: Callable[[Collector], Any]) -> Any:
        """What ``condition`` answers once it is true: exporters and collector take their time."""
        end = time.monotonic() + PATIENCE_S
        while not (found := condition(self)):
            assert time.monotonic() < end, f"it did not arrive; spans: {self.spans()}"
            time.sleep(0.1)
        return found


def _spans(line: dict[str, Any]) -> Iterator[Span]:
    for resource in line["resourceSpans"]:
        service = _values(resource["resource"])["service.name"]
        for scope in resource["scopeSpans"]:
            for span in scope["spans"]:
                yield Span(
                    service=service,
                    name=span["name"],
                    trace=span["traceId"],
                    id=span["spanId"],
                    parent=span.get("parentSpanId", ""),
                    began=int(span["startTimeUnixNano"]),
                    ended=int(span["endTimeUnixNano"]),
                    attributes=_values(span),
                )


def _values(holder: dict[str, Any]) -> dict[str, Any]:
    return {item["key"]: next(iter(item["value"].values())) for item in holder.get("attributes", [])}


@contextmanager
def running_otelcol(folder: Path) -> Iterator[Collector]:
    """A collector with its files in ``folder``."""
    otlp, page, own = free_port(), free_port(), free_port()
    config = folder / "otelcol.yaml"
    config.write_text(yaml.safe_dump(_config(folder, otlp, page, own)))
    made = Collector(f"http://127.0.0.1:{otlp}", f"http://127.0.0.1:{page}/metrics", folder)
    (folder / "traces.jsonl").touch()
    program = Program([str(binary("otelcol")), "--config", str(config)], folder / "otelcol.log")
    program.start(lambda: _answers(made))
    try:
        yield made
    finally:
        program.stop()


def _config(folder: Path, otlp: int, page: int, own: int) -> dict[str, Any]:
    files = {
        name: {"path": str(folder / f"{name}.jsonl"), "flush_interval": "100ms"}
        for name in ("traces", "metrics")
    }
    readers = [{"pull": {"exporter": {"prometheus": {"host": "127.0.0.1", "port": own}}}}]
    return {
        "receivers": {"otlp": {"protocols": {"http": {"endpoint": f"127.0.0.1:{otlp}"}}}},
        "exporters": {
            "prometheus": {"endpoint": f"127.0.0.1:{page}", "metric_expiration": "5m"},
            **{f"file/{name}": options for name, options in files.items()},
        },
        "service": {
            "telemetry": {"metrics": {"readers": readers}},
            "pipelines": {
                "traces": {"receivers": ["otlp"], "exporters": ["file/traces"]},
                "metrics": {"receivers": ["otlp"], "exporters": ["prometheus", "file/metrics"]},
            },
        },
    }


def _answers(collector: Collector) -> bool:
    try:
        posted = httpx.post(f"{collector.url}/v1/traces", json={}, timeout=2)
        return posted.is_success and httpx.get(collector.page, timeout=2).is_success
    except httpx.TransportError:
        return False
