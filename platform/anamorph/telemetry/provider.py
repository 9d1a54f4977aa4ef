"""One object that a process measures itself with, and hands on to what it calls.

Nothing is installed globally: a library that looks for the global tracer or
meter provider finds none of ours, and two services in one process (or two
tests) do not see each other's numbers.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import Meter
from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.metrics.view import View
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Tracer
from prometheus_client import CollectorRegistry, generate_latest

from anamorph.telemetry.guard import ALLOWED, RESOURCE_ALLOWED, GuardedProcessor, clean

_SCOPE = "anamorph"
_EXPORT_TIMEOUT_S = 3.0
# Series of one instrument in one process. Tenants are bounded far below (``metrics.Tenants``); whatever
# else goes wrong ends in one series that says so: otel.metric.overflow="true".
SERIES_LIMIT = 2000


@dataclass(frozen=True)
class Telemetry:
    """Meter, tracer and Prometheus page of one service; ``shutdown`` flushes and ends it."""

    service: str
    meter: Meter
    tracer: Tracer
    _meters: MeterProvider = field(repr=False)
    _tracers: TracerProvider = field(repr=False)
    _registry: CollectorRegistry = field(repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def prometheus(self) -> bytes:
        """The metrics in Prometheus' text format, ``text/plain; version=0.0.4``."""
        with self._lock:  # the reader keeps its last collection in a field of its own
            return generate_latest(self._registry)

    def shutdown(self) -> None:
        """Export what is left and stop background threads; waits seconds at most."""
        _forget(self)
        self._tracers.shutdown()
        self._meters.shutdown(timeout_millis=_EXPORT_TIMEOUT_S * 1000)


def build(
    service: str,
    *,
    resource: Mapping[str, str] | None = None,
    span_processors: Sequence[SpanProcessor] = (),
    metric_readers: Sequence[MetricReader] = (),
) -> Telemetry:
    """Make a fresh ``Telemetry`` around the given processors and readers.

    Without a ``service.instance.id`` it gets a random one: a collector that hears two processes
    of one service would take the second's series for the first's.
    """
    known = {
        "service.name": service,
        "service.version": version("anamorph"),
        "service.instance.id": uuid.uuid4().hex,
        **(resource or {}),
    }
    described = Resource(clean(known, RESOURCE_ALLOWED))
    registry = CollectorRegistry()
    page = PrometheusMetricReader(disable_target_info=True, scope_info_enabled=False, registry=registry)
    meters = MeterProvider(
        metric_readers=[page, *metric_readers],
        resource=described,
        # Exemplars carry the very attributes that the view below drops.
        exemplar_filter=AlwaysOffExemplarFilter(),
        # One view for every instrument; a second one that matches would emit a
        # second stream, so histograms bring their buckets along themselves.
        views=[
            View(instrument_name="*", attribute_keys=set(ALLOWED), aggregation_cardinality_limit=SERIES_LIMIT)
        ],
    )
    tracers = TracerProvider(resource=described)
    for processor in span_processors:
        tracers.add_span_processor(GuardedProcessor(processor))
    return Telemetry(service, meters.get_meter(_SCOPE), tracers.get_tracer(_SCOPE), meters, tracers, registry)


_known: dict[tuple[str, str | None, tuple[tuple[str, str], ...]], Telemetry] = {}
_known_lock = threading.Lock()


def setup(
    service: str, *, otlp_endpoint: str | None = None, resource: Mapping[str, str] | None = None
) -> Telemetry:
    """The telemetry of ``service`` in this process; the same arguments give the same object.

    Args:
        service: name of the service, for example ``anamorph-keysvc``.
        otlp_endpoint: base URL of an OTLP/HTTP collector (``http://host:4318``);
            without it nothing is sent anywhere, and only ``prometheus()`` tells.
        resource: further resource attributes; those outside the allow-list are dropped.
    """
    chosen = (service, otlp_endpoint, tuple(sorted((resource or {}).items())))
    with _known_lock:
        if chosen not in _known:
            _known[chosen] = _exporting(service, otlp_endpoint, resource)
        return _known[chosen]


def _exporting(service: str, endpoint: str | None, resource: Mapping[str, str] | None) -> Telemetry:
    if endpoint is None:
        return build(service, resource=resource)
    # Imported here: the exporters bring protobuf and requests along.
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    base = endpoint.rstrip("/")
    spans = OTLPSpanExporter(f"{base}/v1/traces", timeout=_EXPORT_TIMEOUT_S)
    metrics = OTLPMetricExporter(f"{base}/v1/metrics", timeout=_EXPORT_TIMEOUT_S)
    return build(
        service,
        resource=resource,
        span_processors=[BatchSpanProcessor(spans)],
        metric_readers=[PeriodicExportingMetricReader(metrics)],
    )


def _forget(ended: Telemetry) -> None:
    with _known_lock:
        for chosen in [key for key, telemetry in _known.items() if telemetry is ended]:
            del _known[chosen]
