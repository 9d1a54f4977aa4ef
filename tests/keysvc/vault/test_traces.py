"""One trace from a client to the real Vault, across the network, a thread and the wrapper's retries."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from tests.servers.asgi import serving

from anamorph import telemetry
from anamorph.wire.admin import Role
from anamorph.wire.keyservice import AsyncKeyService
from anamorph_keysvc.app import build_app
from anamorph_keysvc.roots import RootCache
from anamorph_keysvc.vault.auth import Vault
from anamorph_keysvc.vault.settings import Identity
from anamorph_keysvc.vault.wrapper import VaultTransitWrapper

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from tests.keysvc.conftest import World
    from tests.keysvc.vault.conftest import Place

pytestmark = pytest.mark.real
RELEASE = "POST /v1/tenants/{tenant}/models/{model}/keys/{version}:release"


@pytest.fixture
def exported() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def measured(exported: InMemorySpanExporter) -> Iterator[telemetry.Telemetry]:
    built = telemetry.build("keysvc", span_processors=[SimpleSpanProcessor(exported)])
    yield built
    built.shutdown()


def parent_of(span: ReadableSpan) -> tuple[int, int] | None:
    return span.parent and (span.parent.trace_id, span.parent.span_id)


async def test_one_trace_runs_from_the_client_to_vault(
    world: World, place: Place, measured: telemetry.Telemetry, exported: InMemorySpanExporter
) -> None:
    """Each is the child of the one before, and none of them names the tenant, its KEK or a token."""
    for identity in Identity:
        place.wrap_secret_id(identity)
    vault = Vault.open(place.settings(), tracer=measured.tracer)
    place.opened.append(vault)
    world.service = replace(
        world.service, wrapper=VaultTransitWrapper(vault), roots=RootCache(most=1, longest_s=0)
    )
    world.model()
    version, secret = world.staged(), world.secret(Role.CLIENT)
    vault.releaser.ready()
    exported.clear()
    with serving(build_app(world.service, measured)) as url, measured.tracer.start_as_current_span("client"):
        async with AsyncKeyService(url, secret) as keys:
            await keys.release("acme", "chat", version, "client")
    spans = {span.name: span for span in exported.get_finished_spans()}
    chain = [spans[name] for name in ("client", RELEASE, "kms unwrap", "vault decrypt")]
    kinds = [SpanKind.INTERNAL, SpanKind.SERVER, SpanKind.CLIENT, SpanKind.CLIENT]
    assert [span.kind for span in chain] == kinds
    for parent, child in itertools.pairwise(chain):
        assert parent_of(child) == (parent.context.trace_id, parent.context.span_id)
    assert vault.releaser._held is not None
    private = ("acme", world.kek(), vault.releaser._held.granted.token)
    assert not [span.name for span in spans.values() for word in private if word in span.to_json()]
