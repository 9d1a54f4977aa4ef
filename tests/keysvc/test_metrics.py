"""What the service says of itself: metrics, spans, and what is in neither."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Receive, Scope, Send
from tests.keysvc.conftest import Clock, World

from anamorph import errors, telemetry
from anamorph.wire.admin import Activation, Role
from anamorph.wire.keyservice import AsyncKeyService
from anamorph.wire.states import State
from anamorph_keysvc.app import build_app
from anamorph_keysvc.gauges import Sample, Sampler, take_sample
from anamorph_keysvc.metrics import build_metrics
from anamorph_keysvc.observe import ObservedWrapper, Observer, Requests, build_observer
from anamorph_keysvc.scope import WORKER
from anamorph_keysvc.service.transition import PHASES
from anamorph_keysvc.tables import AuditCheckpoint, Tenant

SAMPLE = Sample(dict.fromkeys(State, 0), 1, 0, 0, {}, {}, 0, 0, 0, 0)
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def value(measured: telemetry.Telemetry, name: str, **labels: str) -> float | None:
    """One sample of the Prometheus page, ``None`` if it is not there; an empty label is none."""
    for family in text_string_to_metric_families(measured.prometheus().decode()):
        for sample in family.samples:
            if (sample.name, {k: v for k, v in sample.labels.items() if v}) == (name, labels):
                return sample.value
    return None


@pytest.fixture
def exported() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def measured(exported: InMemorySpanExporter) -> Iterator[telemetry.Telemetry]:
    built = telemetry.build("keysvc", span_processors=[SimpleSpanProcessor(exported)])
    yield built
    built.shutdown()


@pytest.fixture
def observer(world: World, measured: telemetry.Telemetry) -> Observer:
    return build_observer(measured, world.service.database, clock=world.clock, checkpoints=True)


# Gauges


def test_ages_and_delays_are_those_of_the_rows(world: World, clock_of: Clock) -> None:
    """Oldest ACTIVE version, time past its policy, and the phase that each rotation is in."""
    world.model(period_s=3600)
    world.model(model="other")
    world.active()
    clock_of.advance(100)
    world.rotate(model="other")
    clock_of.advance(3600)
    sample = take_sample(world.service.database, world.clock())
    assert sample.versions[State.ACTIVE] == sample.versions[State.PENDING] == 1
    assert sample.versions[State.RETIRED] == 0
    assert (sample.oldest_s, sample.overdue_s, sample.spent) == (3700, 100, 0)
    assert sample.rotations == {**dict.fromkeys(PHASES, 0), "prepared": 3600}
    assert sample.operations == {"rotate": 1, "shred": 0}


def test_an_unprepared_rotation_waits_for_a_worker(world: World, clock_of: Clock) -> None:
    """Until its root is wrapped a version is ``pending``, and its operation is due."""
    from anamorph_keysvc.service import rotation

    world.model()
    world.do(rotation.rotate, "acme", "chat")
    clock_of.advance(50)
    sample = take_sample(world.service.database, world.clock())
    assert sample.rotations["pending"] == sample.waiting_s == 50


def test_a_drain_that_does_not_end_ages(world: World, clock_of: Clock) -> None:
    """From the end of a DRAINING version's grace on; before it there is nothing to tell."""
    world.model()
    world.active()
    world.active()
    clock_of.advance(world.policy.grace_s)
    assert take_sample(world.service.database, world.clock()).drain_overdue_s == 0
    clock_of.advance(70)
    assert take_sample(world.service.database, world.clock()).drain_overdue_s == 70


def test_an_empty_service_has_only_zeros(world: World) -> None:
    """Nothing in any table is no error and no gap."""
    sample = take_sample(world.service.database, world.clock())
    assert set(sample.versions.values()) == {0}
    assert replace(sample, versions={}, rotations={}, operations={}) == Sample(
        {}, 0, 0, 0, {}, {}, 0, 0, 0, 0
    )


def test_uncovered_audit_rows_age_until_an_exported_checkpoint(world: World, clock_of: Clock) -> None:
    """Each tenant's first row beyond its last exported checkpoint counts; one not exported covers nothing."""
    world.model()
    clock_of.advance(500)
    assert _uncovered(world) == 500
    head = _checkpoint(world, exported=False)
    assert _uncovered(world) == 500
    _checkpoint(world, exported=True)
    assert _uncovered(world) == 0
    world.rotate()
    clock_of.advance(7)
    assert _uncovered(world) == 7
    assert head >= 1


def _uncovered(world: World) -> float:
    return take_sample(world.service.database, world.clock(), checkpoints=True).uncovered_s


def _checkpoint(world: World, *, exported: bool) -> int:
    from anamorph_keysvc import audit

    with world.service.database.write(WORKER) as session:
        assert session.get(Tenant, "acme") is not None
        head = audit.head(session, "acme")
        row = AuditCheckpoint(
            tenant="acme",
            sequence=head.sequence,
            digest=head.digest,
            at=world.clock(),
            key_version=1,
            signature="",
            exported_at=world.clock() if exported else None,
        )
        session.merge(row)
    return head.sequence


@pytest.fixture
def clock_of(world: World) -> Clock:
    return world.clock


def test_a_database_that_hangs_holds_up_no_scrape() -> None:
    """One thread waits for it; everybody else goes on with what is known, and nothing piles up."""
    hanging, begun = threading.Event(), []

    def take() -> Sample:
        begun.append(1)
        hanging.wait()
        return SAMPLE

    sampler = Sampler(take, every_s=0, patience_s=0.01)
    assert [sampler.get() for _ in range(5)] == [None] * 5
    assert len(begun) == 1
    hanging.set()
    reader = sampler._reader
    assert reader is not None
    reader.join()
    assert sampler.get() is SAMPLE


def test_a_sample_is_kept_for_a_while_and_no_longer() -> None:
    """Scrapes in quick succession cost one reading; what is too old is no longer shown."""
    clock, taken = Seconds(), [SAMPLE]
    sampler = Sampler(taken.pop, every_s=10, keep_s=60, clock=clock)
    assert sampler.get() is sampler.get() is SAMPLE
    clock.now = 59  # the next reading fails: there is nothing left to pop
    assert sampler.get() is SAMPLE
    clock.now = 61
    assert sampler.get() is None
    assert sampler.age() == 61


class Seconds:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_gauges_vanish_where_the_database_is_gone(world: World, measured: telemetry.Telemetry) -> None:
    """A number that nobody has read lately is not shown; how long ago it was, is."""
    clock, answers = Seconds(), [SAMPLE]
    sampler = Sampler(answers.pop, every_s=0, clock=clock)
    build_metrics(measured.meter, world.service.database, sampler=sampler)
    assert value(measured, "anamorph_keysvc_key_oldest_seconds") == 1
    clock.now = 100
    assert value(measured, "anamorph_keysvc_key_oldest_seconds") is None
    assert value(measured, "anamorph_keysvc_sample_age_seconds") == 100


def test_checkpoints_are_shown_where_there_are_any(world: World, measured: telemetry.Telemetry) -> None:
    """Without an exporter the lag would only ever grow."""
    build_metrics(measured.meter, world.service.database, clock=world.clock)
    assert value(measured, "anamorph_keysvc_audit_uncovered_seconds") is None


def test_connections_in_use_and_their_limit(
    world: World, observer: Observer, measured: telemetry.Telemetry
) -> None:
    """From the pool itself, so that they are known while the database hangs."""
    assert observer
    with world.service.database.read(WORKER):
        used = value(measured, "anamorph_keysvc_database_connections")
    limit = {"sqlite": 64, "postgresql": 16}[world.service.database.dialect]
    assert (used, value(measured, "anamorph_keysvc_database_connections_limit")) == (1, limit)


# Releases


async def test_releases_are_told_apart_by_whether_the_kms_was_asked(world: World) -> None:
    """The first release of a process opens the root, the second finds it opened."""
    world.model()
    version = world.staged()
    app = build_app(replace(world.service, roots=type(world.service.roots)()), fresh := telemetry.build("t"))
    try:
        async with AsyncKeyService(
            "http://keysvc", world.secret(Role.CLIENT), transport=httpx.ASGITransport(app)
        ) as client:
            for _ in range(3):
                await client.release("acme", "chat", version, "client")
        labels = {"anamorph_purpose": "client"}
        for source, count in (("unwrapped", 1), ("cached", 2)):
            labels["anamorph_source"] = source
            assert value(fresh, "anamorph_keysvc_releases_total", **labels) == count
            assert value(fresh, "anamorph_keysvc_release_duration_seconds_count", **labels) == count
    finally:
        fresh.shutdown()


@pytest.mark.parametrize(
    ("error", "metric", "word"),
    [
        (errors.Gone("m", code="key_gone"), "denials", "key_gone"),
        (errors.Conflict("m"), "denials", "Conflict"),
        (errors.Unavailable("m", code="kms_sealed"), "release_failures", "kms_sealed"),
        (errors.KeyMismatch("m"), "release_failures", "KeyMismatch"),
        (ValueError("m"), "release_failures", "ValueError"),
    ],
)
def test_what_is_not_released_is_denied_or_failed(
    observer: Observer, measured: telemetry.Telemetry, error: Exception, metric: str, word: str
) -> None:
    """A refusal is the caller's matter, anything else ours: they are counted apart, by reason."""
    with pytest.raises(type(error)), observer.release("client"):
        raise error
    assert value(measured, f"anamorph_keysvc_{metric}_total", error_type=word) == 1
    for counter in ("denials", "release_failures"):
        assert value(measured, f"anamorph_keysvc_{counter}_total") == 0


# What else reports


@pytest.mark.parametrize(
    ("kind", "outcome", "metric", "labels"),
    [
        ("decrypt", "ok", "kms_attempts", {"anamorph_action": "decrypt"}),
        ("decrypt", "sealed", "kms_attempts", {"anamorph_action": "decrypt", "error_type": "sealed"}),
        ("login", "ok", "kms_attempts", {"anamorph_action": "login"}),
        (
            "renew_issuer",
            "refused_403",
            "kms_logins",
            {"anamorph_action": "renew", "anamorph_identity": "issuer", "error_type": "refused_403"},
        ),
    ],
)
def test_attempts_at_the_kms_and_logins(
    observer: Observer,
    measured: telemetry.Telemetry,
    kind: str,
    outcome: str,
    metric: str,
    labels: dict[str, str],
) -> None:
    """Vault's transport reports all of them by one word; an identity makes it a login or renewal."""
    observer.observe(kind, outcome)
    assert value(measured, f"anamorph_keysvc_{metric}_total", **labels) == 1


def test_phases_and_rounds(observer: Observer, measured: telemetry.Telemetry) -> None:
    """How long a rotation was in a phase, and how a background job fared."""
    observer.phase("staged", 90)
    observer.round("prepare", "ok")
    observer.round("prepare", "kms_sealed")
    name = "anamorph_keysvc_rotation_phase_duration_seconds"
    assert value(measured, f"{name}_sum", anamorph_phase="staged") == 90
    rounds, labels = "anamorph_keysvc_worker_rounds_total", {"anamorph_action": "prepare"}
    assert value(measured, rounds, **labels) == 1
    assert value(measured, rounds, error_type="kms_sealed", **labels) == 1


def test_a_failed_call_leaves_its_word_and_nothing_it_said(
    observer: Observer, measured: telemetry.Telemetry, exported: InMemorySpanExporter
) -> None:
    """Metric and span name the error's code; message and stack stay here."""
    with pytest.raises(errors.Unavailable), observer.call("kms", "unwrap"):
        raise errors.Unavailable("CANARY", code="kms_sealed")
    labels = {"anamorph_kind": "kms", "anamorph_action": "unwrap", "error_type": "kms_sealed"}
    assert value(measured, "anamorph_keysvc_call_duration_seconds_count", **labels) == 1
    (span,) = exported.get_finished_spans()
    assert (span.name, span.status.status_code, span.events) == ("kms unwrap", StatusCode.ERROR, ())
    assert "CANARY" not in span.to_json()


@pytest.mark.parametrize("method", ["wrap", "unwrap", "rewrap", "newest", "rotate", "shred", "check"])
def test_every_call_of_a_wrapper_is_observed(
    world: World, observer: Observer, measured: telemetry.Telemetry, method: str
) -> None:
    """The wrapper in between changes no answer; each call is counted under its name."""
    from anamorph_keysvc.wrapper import root_context

    wrapper, context = ObservedWrapper(world.service.wrapper, observer), root_context("acme", "chat", 1)
    wrapped = world.service.wrapper.wrap("kek", b"s" * 32, context)
    calls: dict[str, Callable[[], object]] = {
        "wrap": lambda: world.service.wrapper.unwrap("kek", wrapper.wrap("kek", b"s" * 32, context), context),
        "unwrap": lambda: wrapper.unwrap("kek", wrapped, context),
        "rewrap": lambda: world.service.wrapper.unwrap(
            "kek", wrapper.rewrap("kek", [(wrapped, context)])[0], context
        ),
        "newest": lambda: wrapper.newest("kek"),
        "rotate": lambda: wrapper.rotate("kek"),
        "shred": lambda: wrapper.shred("kek", 1),
        "check": wrapper.check,
    }
    expected = {"wrap": b"s" * 32, "unwrap": b"s" * 32, "rewrap": b"s" * 32, "newest": 1, "rotate": 1}
    assert calls[method]() == expected.get(method)
    labels = {"anamorph_kind": "kms", "anamorph_action": method}
    assert value(measured, "anamorph_keysvc_call_duration_seconds_count", **labels) == 1
    assert (wrapper.production, wrapper.kek_version(wrapped)) == (False, 1)


def test_a_rotation_tells_how_long_each_phase_took(
    world: World, clock_of: Clock, observer: Observer, measured: telemetry.Telemetry
) -> None:
    """From one change of the version to the next; a resumption after suspending is no phase."""
    from anamorph_keysvc.service import lifecycle, materialization, preparation, rotation

    world.service = replace(world.service, phase=observer.phase)
    world.model()
    operation = world.do(rotation.rotate, "acme", "chat")
    clock_of.advance(10)
    preparation.prepare(world.service, operation.id)
    clock_of.advance(20)
    holder = world.holder(world.grant(1))
    clock_of.advance(40)
    world.release_to_job(holder, "acme", "chat", 1)
    world.do(materialization.stage, holder, "acme", "chat", 1, world.artifact)
    clock_of.advance(80)
    world.do(lifecycle.activate, "acme", "chat", 1, None, Activation(endpoint="http://engine"))
    clock_of.advance(160)
    world.do(lifecycle.suspend, "acme", "chat", 1, None)
    world.do(lifecycle.resume, "acme", "chat", 1, None)
    name = "anamorph_keysvc_rotation_phase_duration_seconds_sum"
    took = {phase: value(measured, name, anamorph_phase=phase) for phase in (*PHASES, "active", "suspended")}
    assert took == {
        "pending": 10,
        "prepared": 20,
        "materializing": 40,
        "staged": 80,
        "active": None,
        "suspended": None,
    }


# Requests


async def answering(world: World, measured: telemetry.Telemetry, *requests: tuple[str, str]) -> None:
    app = build_app(world.service, measured)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    token = world.secret(Role.ADMIN)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://keysvc", headers={"Authorization": f"Bearer {token}"}
    ) as http:
        for method, path in requests:
            await http.request(method, path)


def count(measured: telemetry.Telemetry, method: str, route: str, status: int) -> float | None:
    return value(
        measured,
        "anamorph_keysvc_request_duration_seconds_count",
        http_request_method=method,
        http_route=route,
        http_response_status_code=str(status),
    )


async def test_requests_are_named_by_route_and_status(world: World, measured: telemetry.Telemetry) -> None:
    """Templates, never paths: neither ids nor whatever a scanner makes up becomes a series."""
    world.model()
    version = world.staged()
    await answering(
        world,
        measured,
        ("GET", f"/v1/tenants/acme/models/chat/keys/{version}"),
        ("GET", "/v1/tenants/acme/models/chat/keys/999"),
        ("POST", f"/v1/tenants/acme/models/chat/keys/{version}:suspend"),
        ("GET", "/wp-login.php"),
        ("BREW", "/livez"),
    )
    keys = "/v1/tenants/{tenant}/models/{model}/keys/{version}"
    assert count(measured, "GET", keys, 200) == count(measured, "GET", keys, 404) == 1
    assert count(measured, "POST", f"{keys}:suspend", 409) == 1
    assert count(measured, "GET", "none", 404) == 1
    assert count(measured, "_OTHER", "/livez", 405) == 1
    assert b"acme" not in measured.prometheus()


async def test_an_exception_that_nobody_answers_counts_as_500(
    observer: Observer, measured: telemetry.Telemetry, exported: InMemorySpanExporter
) -> None:
    """It goes on to the server, and leaves neither message nor stack in the span."""

    async def failing(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise RuntimeError("CANARY")

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(Requests(failing, observer)), base_url="http://keysvc"
    ) as http:
        with pytest.raises(RuntimeError):
            await http.get("/")
    assert count(measured, "GET", "none", 500) == 1
    (span,) = exported.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert "CANARY" not in span.to_json()


async def test_one_trace_runs_from_the_client_to_the_kms(
    world: World, measured: telemetry.Telemetry, exported: InMemorySpanExporter
) -> None:
    """Client, request and call of the KMS are parent and child, across the network and a thread."""
    world.model()
    version = world.staged()
    app = build_app(replace(world.service, roots=type(world.service.roots)()), measured)
    async with AsyncKeyService(
        "http://keysvc", world.secret(Role.CLIENT), transport=httpx.ASGITransport(app)
    ) as keys:
        with measured.tracer.start_as_current_span("client"):
            await keys.release("acme", "chat", version, "client")
    spans = {span.name: span for span in exported.get_finished_spans()}
    release = "POST /v1/tenants/{tenant}/models/{model}/keys/{version}:release"
    chain = [spans["client"], spans[release], spans["kms unwrap"]]
    assert [span.kind for span in chain] == [SpanKind.INTERNAL, SpanKind.SERVER, SpanKind.CLIENT]
    for parent, child in itertools.pairwise(chain):
        assert _ids(child) == (parent.context.trace_id, parent.context.span_id)
    assert not [span.name for span in spans.values() if "acme" in span.to_json()]


def _ids(span: ReadableSpan) -> tuple[int, int]:
    assert span.parent is not None
    return span.parent.trace_id, span.parent.span_id


async def test_a_foreign_callers_trace_goes_on(
    world: World, measured: telemetry.Telemetry, exported: InMemorySpanExporter
) -> None:
    """W3C trace context from any client; its other headers are read by nobody."""
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "v=CANARY", "baggage": "p=CANARY"}
    transport = httpx.ASGITransport(build_app(world.service, measured))
    async with httpx.AsyncClient(transport=transport, base_url="http://keysvc") as http:
        await http.get("/livez", headers=headers)
    (span,) = exported.get_finished_spans()
    assert _ids(span) == (int(TRACE, 16), int(PARENT, 16))
    assert "CANARY" not in span.to_json()


async def test_the_clients_send_traceparent_only(measured: telemetry.Telemetry) -> None:
    """And none where there is no span."""
    seen: list[httpx.Headers] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers)
        return httpx.Response(200, json={"keys": []})

    async with AsyncKeyService("http://keysvc", transport=httpx.MockTransport(handle)) as keys:
        await keys.inference_keys()
        with measured.tracer.start_as_current_span("client") as span:
            await keys.inference_keys()
    assert "traceparent" not in seen[0]
    assert seen[1]["traceparent"].split("-")[1] == format(span.get_span_context().trace_id, "032x")
    assert not {"tracestate", "baggage"} & set(seen[1])
