"""Traces and metrics, with OpenTelemetry's names for generative AI.

    telemetry = setup("anamorph-engine", otlp_endpoint=settings.otlp_endpoint)
    metrics = InferenceMetrics(telemetry.meter, "acme", "smol", "encrypted")
    timer = metrics.start()
    ...
    timer.token()
    timer.finish("ok")

What may stand in an attribute is decided in ``guard``: never ids, text, keys or credentials.
"""

from anamorph.telemetry import names, traces
from anamorph.telemetry.guard import clean
from anamorph.telemetry.metrics import OK, InferenceMetrics, Protection, RequestTimer
from anamorph.telemetry.provider import Telemetry, build, setup

__all__ = [
    "OK",
    "InferenceMetrics",
    "Protection",
    "RequestTimer",
    "Telemetry",
    "build",
    "clean",
    "names",
    "setup",
    "traces",
]
