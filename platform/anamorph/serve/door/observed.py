"""The door as telemetry sees it: a span for each request, the time until its answer began, and breaks."""

from __future__ import annotations

import time
from collections.abc import Callable

from opentelemetry.trace import SpanKind
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anamorph.serve.asgi.connection import relative_path
from anamorph.telemetry import Telemetry, clean, names, traces
from anamorph.telemetry.metrics import histogram

_METHODS = frozenset({"GET", "POST"})
# Why an answer breaks off; counted from zero, so that the first one shows as an increase.
_BREAKS = ("timeout", "unavailable")


class Observed:
    """ASGI middleware in front of the door. What is behind it sees the door's span as its caller's.

    No tenant is named: engines count for each tenant, and the door has more of them than
    one process should have series.

    Args:
        app: the door.
        telemetry: of its process.
        clock: monotonic seconds.
    """

    def __init__(
        self, app: ASGIApp, telemetry: Telemetry, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._app, self._clock = app, clock
        self.use(telemetry)

    def use(self, telemetry: Telemetry) -> None:
        """From now on tell this one: where it goes to is part of what the operator pushes."""
        self._tracer = telemetry.tracer
        self._answers = histogram(
            telemetry.meter, names.DOOR_ANSWER_DURATION, "s", "Time until the door began to answer"
        )
        self._breaks = telemetry.meter.create_counter(
            names.DOOR_BROKEN, "{request}", "Answers that broke off after they had begun"
        )
        for code in _BREAKS:
            self._breaks.add(0, clean({names.ERROR_TYPE: code}))

    def broke(self, code: str) -> None:
        """Count an answer that has begun, with a 200, and broke off."""
        self._breaks.add(1, clean({names.ERROR_TYPE: code}))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or relative_path(scope) == "/healthz":
            return await self._app(scope, receive, send)
        began = self._clock()
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        with traces.span(
            self._tracer,
            "door",
            context=traces.extract(Headers(scope=scope)),
            kind=SpanKind.SERVER,
            attributes={names.METHOD: method},
        ) as span:

            async def noting(message: Message) -> None:
                if message["type"] == "http.response.start":
                    attributes = clean({names.METHOD: method, names.STATUS_CODE: message["status"]})
                    span.set_attributes(attributes)
                    self._answers.record(self._clock() - began, attributes)
                await send(message)

            return await self._app(_joined(scope), receive, noting)


def _joined(scope: Scope) -> Scope:
    """The same request, called from the current span; ``tracestate`` is others' free text and ends here."""
    joined = {**scope, "headers": [(n, v) for n, v in scope["headers"] if n not in _TRACE]}
    outgoing: dict[str, str] = {}
    traces.inject(outgoing)
    MutableHeaders(scope=joined).update(outgoing)
    return joined


_TRACE = {b"traceparent", b"tracestate"}
