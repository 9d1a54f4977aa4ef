"""Calls to Vault under faults: retried where that is safe, over within the deadline, closed when done."""

from __future__ import annotations

import ast
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tests.servers.proxies import StatusProxy

from anamorph import errors
from anamorph_keysvc import deadline
from anamorph_keysvc.vault.auth import Vault
from anamorph_keysvc.vault.settings import Identity
from anamorph_keysvc.vault.transport import Answer, Call, Transport
from anamorph_keysvc.vault.wrapper import VaultTransitWrapper
from anamorph_keysvc.wrapper import root_context

if TYPE_CHECKING:
    from tests.keysvc.vault.conftest import Counted, Place
    from tests.servers.proxies import Toxiproxy

pytestmark = pytest.mark.real
AT = root_context("acme", "chat", 1)
WITHIN_S = 3.5
HEALTH = Call("read", "GET", ("sys", "health"))


@pytest.fixture
def proxy(place: Place) -> Iterator[StatusProxy]:
    server = place.server
    with StatusProxy(server.url, authority=server.ca_file, certificate=server.certificate) as running:
        yield running
        # Before the proxy: its event loop does not end while a client keeps a TLS connection open.
        running.heal()
        place.close()


@pytest.fixture
def through(place: Place, proxy: StatusProxy, counted: Counted) -> VaultTransitWrapper:
    """A wrapper that reaches Vault by the proxy, its identities logged in."""
    wrapper = VaultTransitWrapper(place.open(counted, address=proxy.url))
    wrapper.check()
    proxy.heal()
    return wrapper


@pytest.mark.parametrize("status", [412, 429, 473, 500, 502, 503])
def test_repeatable_calls_outlive_a_few_bad_answers(
    through: VaultTransitWrapper, proxy: StatusProxy, counted: Counted, kek: str, status: int
) -> None:
    """Encrypting, decrypting, rewrapping, reading."""
    wrapped = through.wrap(kek, b"root", AT)
    for part in ("encrypt", "decrypt", "rewrap", "keys"):
        proxy.inject(status, times=2, part=f"/{part}/")
    assert through.newest(kek) == 1
    through.wrap(kek, b"root", AT)
    [rewrapped] = through.rewrap(kek, [(wrapped, AT)])
    assert through.unwrap(kek, rewrapped, AT) == b"root"
    assert sum(arrival.injected for arrival in proxy.arrived) == 8
    assert counted.seen["decrypt", "unavailable"] == 2


@pytest.mark.parametrize("status", [500, 502, 503])
def test_rotation_of_unknown_outcome_is_not_repeated(
    through: VaultTransitWrapper, proxy: StatusProxy, kek: str, status: int
) -> None:
    """It may have been done: the caller looks before it asks again."""
    through.wrap(kek, b"root", AT)
    proxy.inject(status, part="/rotate")
    with pytest.raises(errors.Unavailable) as unknown:
        through.rotate(kek)
    assert unknown.value.code == "kms_unavailable"
    assert len([arrival for arrival in proxy.arrived if arrival.path.endswith("/rotate")]) == 1


@pytest.mark.parametrize("status", [412, 429, 473])
def test_rotation_that_was_not_begun_is_repeated(
    through: VaultTransitWrapper, proxy: StatusProxy, kek: str, status: int
) -> None:
    """These statuses say that nothing was done."""
    through.wrap(kek, b"root", AT)
    proxy.inject(status, part="/rotate")
    assert through.rotate(kek) == 2


@pytest.mark.parametrize("status", [412, 429, 473, 503])
def test_lasting_fault_ends_with_the_deadline(
    through: VaultTransitWrapper, proxy: StatusProxy, kek: str, status: int
) -> None:
    """Not after one retry too many; and afterwards all is well."""
    wrapped = through.wrap(kek, b"root", AT)
    proxy.inject(status, times=10_000, part="/decrypt/")
    with fails_in_time("kms_unavailable"):
        through.unwrap(kek, wrapped, AT)
    proxy.heal()
    assert through.unwrap(kek, wrapped, AT) == b"root"


def test_callers_deadline_is_kept(through: VaultTransitWrapper, proxy: StatusProxy, kek: str) -> None:
    """A shorter one around the call ends it sooner: the retries fit into half a second, or are not made."""
    wrapped = through.wrap(kek, b"root", AT)
    proxy.inject(503, times=10_000, part="/decrypt/")
    with deadline.within(0.5), pytest.raises(errors.Unavailable):
        through.unwrap(kek, wrapped, AT)
    assert len(proxy.arrived) < 12


def test_redirect_is_not_followed(through: VaultTransitWrapper, proxy: StatusProxy, kek: str) -> None:
    """The token would go with it."""
    with StatusProxy("http://127.0.0.1:9") as elsewhere:
        proxy.inject(307, headers={"Location": f"{elsewhere.url}/v1/x"})
        with pytest.raises(errors.Unavailable, match="redirect"):
            through.newest(kek)
        assert elsewhere.arrived == []


def test_sealed_is_said_and_nothing_hangs(
    wrapper: VaultTransitWrapper, place: Place, counted: Counted, kek: str
) -> None:
    """Every method, at once; after unsealing all works again without a new login."""
    wrapped = wrapper.wrap(kek, b"root", AT)
    wrapper.check()
    place.server.seal()
    try:
        for act in (
            wrapper.check,
            lambda: wrapper.wrap(kek, b"root", AT),
            lambda: wrapper.unwrap(kek, wrapped, AT),
            lambda: wrapper.rewrap(kek, [(wrapped, AT)]),
            lambda: wrapper.newest(kek),
            lambda: wrapper.rotate(kek),
            lambda: wrapper.shred(kek, 1),
        ):
            with fails_in_time("kms_sealed"):
                act()
    finally:
        place.server.unseal()
    assert wrapper.unwrap(kek, wrapped, AT) == b"root"
    assert counted.of("login_releaser") == 1


def test_first_login_at_a_sealed_vault(place: Place) -> None:
    """A process that starts then: the wrapped secret id is not lost."""
    vault = place.open()
    place.server.seal()
    try:
        with fails_in_time("kms_sealed"):
            vault.issuer.ready()
    finally:
        place.server.unseal()
    vault.issuer.ready()


@pytest.mark.slow
def test_restart_is_outlived(wrapper: VaultTransitWrapper, place: Place, kek: str) -> None:
    """While it is gone: unavailable. After it: the same tokens and new connections."""
    wrapped = wrapper.wrap(kek, b"root", AT)
    wrapper.check()
    place.server.stop()
    try:
        with fails_in_time("kms_unavailable"):
            wrapper.unwrap(kek, wrapped, AT)
    finally:
        place.server.start()
        place.server.unseal()
    assert wrapper.unwrap(kek, wrapped, AT) == b"root"
    assert wrapper.rotate(kek) == 2


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["latency", "hang", "reset", "cut"])
def test_network_faults_end_in_time_and_leave_nothing(
    place: Place, toxiproxy: Toxiproxy, kek: str, fault: str
) -> None:
    """Slow, half-open, reset, refused: unavailable in time, well afterwards, no thread or socket left."""
    with toxiproxy.proxy(place.server.port) as port:
        vault = place.open(address=f"https://127.0.0.1:{port.port}")
        wrapper = VaultTransitWrapper(vault)
        wrapped = wrapper.wrap(kek, b"root", AT)
        wrapper.check()
        before = resources(port.port)
        harm = {
            "latency": lambda: port.latency(2000),
            "hang": port.hang,
            "reset": port.reset_peer,
            "cut": port.cut,
        }
        harm[fault]()
        acts: tuple[Callable[[], object], ...] = (
            lambda: wrapper.unwrap(kek, wrapped, AT),
            lambda: wrapper.rotate(kek),
            lambda: wrapper.wrap(f"{kek}-new", b"root", AT),
            wrapper.check,
        )
        found = {outcome(act) for act in acts}
        # Two seconds are less than the deadline: an open connection may answer in time.
        assert found <= ({"ok", "kms_unavailable"} if fault == "latency" else {"kms_unavailable"})
        port.heal()
        assert wrapper.unwrap(kek, wrapped, AT) == b"root"
        assert all(now <= then for now, then in zip(resources(port.port), before, strict=True))
        vault.close()
        assert resources(port.port)[1] == 0


@contextmanager
def fails_in_time(code: str) -> Iterator[None]:
    """The acceptance of the key service: an error within 3.5 s, whatever Vault does."""
    started = time.monotonic()
    with pytest.raises(errors.Unavailable) as failed:
        yield
    assert failed.value.code == code
    assert failed.value.retry_after
    assert time.monotonic() - started < WITHIN_S


def outcome(act: Callable[[], object]) -> str:
    """How a call ended, which it did in time."""
    started, code = time.monotonic(), "ok"
    try:
        act()
    except errors.Unavailable as error:
        code = str(error.code)
    assert time.monotonic() - started < WITHIN_S
    return code


def resources(port: int) -> tuple[int, int]:
    """Threads of this process, and its open connections to a port."""
    connections = psutil.Process().net_connections("tcp")
    open_ones = [each for each in connections if each.raddr and each.raddr.port == port]
    return threading.active_count(), len([each for each in open_ones if each.status == "ESTABLISHED"])


def test_body_that_drips_ends_with_the_deadline(place: Place) -> None:
    """Each byte comes within the read timeout, the whole never would."""
    with drip() as url:
        transport = Transport(place.settings(address=url, ca_file=None, production=False))
        with fails_in_time("kms_unavailable"):
            transport.call(Call("read", "GET", ("sys", "health"), repeatable=True), None)
        transport.close()


@contextmanager
def drip() -> Iterator[str]:
    """A server that answers with a long body, five bytes a second."""
    ended = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(30)

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            with suppress(OSError):  # the client gives up: that is what is tested
                while not ended.wait(0.2):
                    connection.sendall(b" ")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        ended.set()
        thread.join()
        listener.close()


def test_too_many_calls_wait_for_their_turn(place: Place) -> None:
    """And for no longer than their own deadline."""
    with drip() as url:
        settings = place.settings(address=url, ca_file=None, production=False, max_connections=1)
        transport = Transport(settings)
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(transport.call, HEALTH, None)
            while transport._turns._value:
                time.sleep(0.01)
            with deadline.within(0.2), pytest.raises(errors.Unavailable, match="more than it answers"):
                transport.call(HEALTH, None)
            assert isinstance(first.exception(), errors.Unavailable)
        transport.close()


def test_only_the_pinned_authority_is_trusted(place: Place) -> None:
    """With the system's authorities, Vault's own certificate is refused."""
    transport = Transport(place.settings(production=False, ca_file=None))
    with fails_in_time("kms_unavailable"):
        transport.call(HEALTH, None)
    transport.close()


@pytest.mark.parametrize("part", ["..", "a/b", "%2e%2e", "", "A", "a.b", "a?x", "a#x", "\u0430"])
def test_path_is_made_of_labels(place: Place, counted: Counted, part: str) -> None:
    """The second line of defence, for every caller there may ever be."""
    transport = Transport(place.settings(), counted)
    with pytest.raises(errors.InvalidId):
        transport.call(Call("read", "GET", ("sys", part)), "token")
    assert not counted.seen
    transport.close()


def test_nothing_secret_in_logs_exceptions_or_traces(
    place: Place, proxy: StatusProxy, kek: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Tokens, secret ids and roots, at every level of every logger, when all goes wrong."""
    caplog.set_level(logging.DEBUG)
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    for identity in Identity:
        place.wrap_secret_id(identity)
    vault = Vault.open(place.settings(address=proxy.url), tracer=provider.get_tracer("test"))
    place.opened.append(vault)
    wrapper = VaultTransitWrapper(vault)
    wrapper.wrap(kek, b"canary-of-a-root", AT)
    proxy.inject(500, times=10_000)
    with pytest.raises(errors.Unavailable) as failed:
        wrapper.wrap(kek, b"canary-of-a-root", AT)
    proxy.heal()
    assert vault.issuer._held is not None
    secrets = [vault.issuer._held.granted.token, "canary-of-a-root", "Y2FuYXJ5LW9mLWEtcm9vd"]
    shown = [repr(failed.value), str(failed.value.__cause__), caplog.text]
    shown += [span.to_json() for span in spans.get_finished_spans()]
    assert "vault encrypt" in {span.name for span in spans.get_finished_spans()}
    assert not [secret for secret in secrets for text in shown if secret in text]
    assert failed.value.__cause__ is None
    provider.shutdown()


def test_answer_hides_its_body() -> None:
    """It may be a root."""
    answer = Answer(200, {"data": {"plaintext": "canary"}})
    assert "canary" not in repr(answer)
    assert "canary" not in repr(Call("encrypt", "POST", ("x",), {"plaintext": "canary"}))


def test_hvac_is_imported_by_the_transport_alone() -> None:
    """And requests by nobody else either."""
    sources = Path(__file__).parents[3] / "keysvc" / "anamorph_keysvc"
    users = {file.name for file in sources.rglob("*.py") if {"hvac", "requests"} & imported(file)}
    assert users == {"transport.py"}


def imported(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.partition(".")[0] for name in plain} | {
        (node.module or "").partition(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)
    }


def test_answer_that_is_not_vaults(place: Place) -> None:
    """A page of something between us and Vault is no success."""
    with page(b"<html>") as url:
        transport = Transport(place.settings(address=url, ca_file=None, production=False))
        with pytest.raises(errors.Unavailable):
            transport.call(HEALTH, None)
        transport.close()


@contextmanager
def page(body: bytes) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(30)

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            head = f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        thread.join()
        listener.close()
