"""Spans and metrics of requests, releases, calls of the KMS, and background jobs.

    with observer.call("kms", "unwrap"):
        ...

One trace runs from the client's span over the request's to the call of the KMS. Spans
and metrics name routes, operations and words for errors; never a tenant, a key, or what
an exception said (``anamorph.telemetry.guard`` sees to it again).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anamorph import errors
from anamorph.telemetry import Telemetry, names, traces
from anamorph.telemetry.guard import OTHER
from anamorph_keysvc.database import Database
from anamorph_keysvc.metrics import Metrics, build_metrics
from anamorph_keysvc.service.work import utc_now
from anamorph_keysvc.wrapper import Context, KeyWrapper

OK: Final = "ok"
NO_ROUTE: Final = "none"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class _Opening:
    """Whether the KMS was asked during the release of this context."""

    unwrapped = False


_opening: ContextVar[_Opening | None] = ContextVar("anamorph_keysvc_opening", default=None)


@dataclass(frozen=True)
class Observer:
    """Hears what the service does.

    Args:
        tracer: of the service's ``Telemetry``.
        metrics: its instruments.
        clock: monotonic seconds.
    """

    tracer: Tracer
    metrics: Metrics
    clock: Callable[[], float] = time.perf_counter

    @contextmanager
    def call(self, kind: str, operation: str) -> Iterator[Span]:
        """A span and a duration for a call of something outside, such as ``kms``."""
        began, attributes = self.clock(), {names.KIND: kind, names.ACTION: operation}
        with _span(self.tracer, f"{kind} {operation}", attributes) as span:
            failed = {}
            try:
                yield span
            except BaseException as error:
                failed = {names.ERROR_TYPE: word_of(error)}
                raise
            finally:
                self.metrics.calls.record(self.clock() - began, {**attributes, **failed})

    @contextmanager
    def release(self, purpose: str) -> Iterator[None]:
        """Count a release, a denial or a failure; the duration by whether the KMS was asked."""
        began, opening = self.clock(), _Opening()
        token = _opening.set(opening)
        try:
            yield
        except Exception as error:
            self._not_released(error)
            raise
        finally:
            _opening.reset(token)
        source = "unwrapped" if opening.unwrapped else "cached"
        attributes = {names.PURPOSE: purpose, names.SOURCE: source}
        self.metrics.releases.add(1, attributes)
        self.metrics.release_duration.record(self.clock() - began, attributes)

    def _not_released(self, error: Exception) -> None:
        denied = isinstance(error, errors.ServiceError) and not isinstance(error, errors.Unavailable)
        counter = self.metrics.denials if denied else self.metrics.release_failures
        counter.add(1, {names.ERROR_TYPE: word_of(error)})

    def observe(self, kind: str, outcome: str) -> None:
        """Count an attempt at the KMS, or a login or renewal: ``login_issuer``, ``renew_issuer``."""
        action, _, identity = kind.partition("_")
        failed = {} if outcome == OK else {names.ERROR_TYPE: outcome}
        if identity and action in {"login", "renew"}:
            self.metrics.kms_logins.add(1, {names.ACTION: action, names.IDENTITY: identity, **failed})
        else:
            self.metrics.kms_attempts.add(1, {names.ACTION: kind, **failed})

    def phase(self, phase: str, seconds: float) -> None:
        """A rotation has left a phase (``gauges.PHASES``) after so many seconds."""
        self.metrics.rotation_phases.record(max(seconds, 0.0), {names.PHASE: phase})

    def round(self, job: str, outcome: str) -> None:
        """A background job has had its turn."""
        failed = {} if outcome == OK else {names.ERROR_TYPE: outcome}
        self.metrics.rounds.add(1, {names.ACTION: job, **failed})


def build_observer(
    telemetry: Telemetry,
    database: Database,
    *,
    clock: Callable[[], datetime] = utc_now,
    checkpoints: bool = False,
) -> Observer:
    """The observer of one service; once per ``telemetry``. Arguments as of ``metrics.build_metrics``."""
    metrics = build_metrics(telemetry.meter, database, clock=clock, checkpoints=checkpoints)
    return Observer(telemetry.tracer, metrics)


def word_of(error: BaseException) -> str:
    """One word for an error: its code, else its class; never its message."""
    code = getattr(error, "code", None)
    return code if isinstance(error, errors.ServiceError) and code else type(error).__name__


@contextmanager
def _span(tracer: Tracer, name: str, attributes: dict[str, str]) -> Iterator[Span]:
    """A client's span; an error leaves its word on it, and neither message nor stack."""
    with tracer.start_as_current_span(
        name,
        kind=SpanKind.CLIENT,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield span
        except BaseException as error:
            _fail(span, word_of(error))
            raise


def _fail(span: Span, word: str) -> None:
    span.set_attribute(names.ERROR_TYPE, word)
    span.set_status(Status(StatusCode.ERROR))


class Requests:
    """ASGI middleware: a span and a duration per request, named by the route's template.

    It stands outside of all others, so that what they answer counts as well. The caller's
    ``traceparent`` is taken before anybody is authenticated, as is usual: it names no one.
    """

    def __init__(self, app: ASGIApp, observer: Observer) -> None:
        self.app = app
        self.observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = self.observer.clock(), 500

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        method = scope["method"] if scope["method"] in _METHODS else OTHER
        with self.observer.tracer.start_as_current_span(
            method,
            context=traces.extract(Headers(scope=scope)),
            kind=SpanKind.SERVER,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                await self.app(scope, receive, seen)
            finally:
                self._finish(span, method, route_of(scope), status, self.observer.clock() - began)

    def _finish(self, span: Span, method: str, route: str, status: int, seconds: float) -> None:
        attributes: dict[str, str | int] = {
            names.METHOD: method,
            names.ROUTE: route,
            names.STATUS_CODE: status,
        }
        span.update_name(f"{method} {route}")
        span.set_attributes(attributes)
        if status >= 500:
            _fail(span, str(status))
        self.observer.metrics.requests.record(seconds, attributes)


def route_of(scope: Scope) -> str:
    """The template of the route that took the request, without convertors: ``/v1/tenants/{tenant}``."""
    path: str | None = getattr(scope.get("route"), "path", None)
    if path is None:
        return NO_ROUTE
    return path.replace(":int}", "}").replace(":id}", "}")


class ObservedWrapper:
    """A wrapper whose every call is observed; wraps ``VaultTransitWrapper`` or ``LocalWrapper``."""

    def __init__(self, behind: KeyWrapper, observer: Observer) -> None:
        self._behind = behind
        self._observer = observer

    @property
    def production(self) -> bool:
        """As the wrapper behind it."""
        return self._behind.production

    def wrap(self, kek: str, secret: bytes, context: Context) -> bytes:
        """See ``KeyWrapper``, as for all that follows."""
        with self._observer.call("kms", "wrap"):
            return self._behind.wrap(kek, secret, context)

    def unwrap(self, kek: str, ciphertext: bytes, context: Context) -> bytes:
        """Marks the release of this context, if there is one, as not answered from the cache."""
        opening = _opening.get()
        if opening is not None:
            opening.unwrapped = True
        with self._observer.call("kms", "unwrap"):
            return self._behind.unwrap(kek, ciphertext, context)

    def rewrap(self, kek: str, items: Sequence[tuple[bytes, Context]]) -> list[bytes]:
        with self._observer.call("kms", "rewrap"):
            return self._behind.rewrap(kek, items)

    def kek_version(self, ciphertext: bytes) -> int:
        return self._behind.kek_version(ciphertext)

    def newest(self, kek: str) -> int:
        with self._observer.call("kms", "newest"):
            return self._behind.newest(kek)

    def rotate(self, kek: str) -> int:
        with self._observer.call("kms", "rotate"):
            return self._behind.rotate(kek)

    def shred(self, kek: str, below: int) -> None:
        with self._observer.call("kms", "shred"):
            self._behind.shred(kek, below)

    def check(self) -> None:
        with self._observer.call("kms", "check"):
            self._behind.check()
