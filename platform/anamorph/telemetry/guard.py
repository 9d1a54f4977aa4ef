"""What may leave a process as telemetry: an allow-list of names, a grammar of values.

Traces and metrics go to systems that hold no key and are trusted with no
prompt. So nothing passes because it was not thought of: an attribute that is
not named here is dropped, a string that is not one short word becomes
``_OTHER`` (the conventions' word for that), a list is dropped whatever its
name, and of an exception only its type remains, since messages and stack
traces quote what the program was working on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from opentelemetry.context import Context
from opentelemetry.sdk.trace import Event, ReadableSpan, Span, SpanProcessor
from opentelemetry.trace import Link, Status
from opentelemetry.util.types import Attributes

from anamorph.telemetry import names

OTHER: Final = "_OTHER"

ALLOWED: Final[frozenset[str]] = frozenset(
    {
        names.OPERATION,
        names.REQUEST_MODEL,
        names.TOKEN_TYPE,
        names.INPUT_TOKENS,
        names.OUTPUT_TOKENS,
        names.ERROR_TYPE,
        names.PROTECTION,
        names.TENANT,
        names.KEY_ID,
        names.VERSION,
        names.STATE,
        names.POOL,
        names.ACTION,
        names.MEASURE,
        names.STATISTIC,
        names.LENGTH,
        names.REASON,
        names.KIND,
        names.PHASE,
        names.PURPOSE,
        names.SOURCE,
        names.IDENTITY,
        names.METHOD,
        names.ROUTE,
        names.STATUS_CODE,
        "exception.type",
    }
)

RESOURCE_ALLOWED: Final[frozenset[str]] = frozenset(
    {
        "service.name",
        "service.version",
        "service.namespace",
        "service.instance.id",
        "deployment.environment.name",
        "k8s.namespace.name",
        "k8s.pod.name",
        "k8s.node.name",
    }
)

# No blank, comma or bracket: neither a sentence nor a list of ids is a word.
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/{}*+-]{0,159}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/{} *-]{0,79}")

Value = str | bool | int | float


def word(value: str) -> str:
    """``value`` if it is one short word, else ``_OTHER``."""
    return value if _WORD.fullmatch(value) else OTHER


def clean(attributes: Mapping[str, object] | None, allowed: frozenset[str] = ALLOWED) -> dict[str, Value]:
    """Return the attributes that may leave the process."""
    kept: dict[str, Value] = {}
    for name, value in (attributes or {}).items():
        if name not in allowed:
            continue
        if isinstance(value, str):
            kept[name] = word(value)
        elif isinstance(value, bool | int | float):
            kept[name] = value
    return kept


def _clean_event(event: Event) -> Event:
    name = event.name if event.name == "exception" else OTHER
    return Event(name, clean(event.attributes), event.timestamp)


def clean_span(span: ReadableSpan) -> ReadableSpan:
    """A copy of a finished span that holds nothing but what is allowed.

    Names of spans are constants of the code; one that does not look like a name
    becomes ``_OTHER``. The description of a status is dropped.
    """
    return ReadableSpan(
        name=span.name if _NAME.fullmatch(span.name) else OTHER,
        context=span.get_span_context(),
        parent=span.parent,
        resource=span.resource,
        attributes=clean(span.attributes),
        events=[_clean_event(event) for event in span.events],
        links=[Link(link.context) for link in span.links],
        kind=span.kind,
        status=Status(span.status.status_code),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


class GuardedProcessor(SpanProcessor):
    """Hands cleaned copies of spans to another processor."""

    def __init__(self, behind: SpanProcessor) -> None:
        self._behind = behind

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        self._behind.on_start(span, parent_context)

    def on_end(self, span: ReadableSpan) -> None:
        self._behind.on_end(clean_span(span))

    def shutdown(self) -> None:
        self._behind.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._behind.force_flush(timeout_millis)


def metric_attributes(attributes: Mapping[str, object]) -> Attributes:
    """``clean`` with the type that instruments take."""
    return dict(clean(attributes))
