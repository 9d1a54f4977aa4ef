"""Faults before servers: each does what it says, and is over when healed."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from tests.servers.process import free_port
from tests.servers.vault import certify

if TYPE_CHECKING:
    from tests.servers.proxies import Fault, StatusProxy, Stream, Toxiproxy
    from tests.servers.vault import VaultServer

HOST = "127.0.0.1"


class Echo(BaseHTTPRequestHandler):
    """Answers each request of a connection with its first line and its body."""

    protocol_version = "HTTP/1.1"

    def parse_request(self) -> bool:
        """Any method will do: ``do_LIST`` is ``do``."""
        parsed = super().parse_request()
        setattr(self, f"do_{self.command}", self.do)
        return parsed

    def handle(self) -> None:
        with suppress(ConnectionError):  # a fault may end it at any time
            super().handle()

    def do(self) -> None:
        body = self.requestline.encode() + b"|" + self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def upstream() -> Iterator[int]:
    """The port of a server that echoes requests."""
    with ThreadingHTTPServer((HOST, 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture
def fault(toxiproxy: Toxiproxy, upstream: int) -> Iterator[Fault]:
    with toxiproxy.proxy(upstream) as fault:
        yield fault


def get(port: int, timeout: float = 30) -> str:
    return httpx.get(f"http://{HOST}:{port}/a", timeout=timeout, trust_env=False).text


@pytest.mark.real
def test_healthy_fault_passes_everything(fault: Fault) -> None:
    """Without a fault the port is the server."""
    assert get(fault.port) == "GET /a HTTP/1.1|"


@pytest.mark.real
def test_latency_delays_answers(fault: Fault) -> None:
    """Answers come, later than somebody waits who waits for less than the latency."""
    fault.latency(300)
    with pytest.raises(httpx.ReadTimeout):
        get(fault.port, timeout=0.1)
    assert get(fault.port) == "GET /a HTTP/1.1|"


@pytest.mark.real
@pytest.mark.parametrize("stream", ["upstream", "downstream"])
def test_reset_peer_resets(fault: Fault, stream: Stream) -> None:
    """A new connection is reset when it is used, one that was open ends."""
    with httpx.Client(base_url=f"http://{HOST}:{fault.port}", trust_env=False, timeout=30) as client:
        assert client.get("/a").is_success
        fault.reset_peer(stream)
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            client.get("/a")
    with socket.create_connection((HOST, fault.port), timeout=30) as fresh:
        fresh.sendall(b"GET /a HTTP/1.1\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            fresh.recv(1)


@pytest.mark.real
@pytest.mark.parametrize("stream", [None, "upstream", "downstream"])
def test_hang_is_half_open_until_healed(fault: Fault, stream: Stream | None) -> None:
    """A connection opens and nothing comes; healed, it works for new ones."""
    fault.hang(stream)
    with pytest.raises(httpx.ReadTimeout):
        get(fault.port, timeout=0.2)
    fault.heal()
    assert get(fault.port) == "GET /a HTTP/1.1|"


@pytest.mark.real
def test_cut_refuses_until_healed(fault: Fault) -> None:
    """A cut port refuses connections; healed, it works again, as the same port."""
    fault.cut()
    with pytest.raises(httpx.ConnectError):
        get(fault.port)
    fault.heal()
    assert get(fault.port) == "GET /a HTTP/1.1|"


@pytest.fixture
def statuses(upstream: int) -> Iterator[StatusProxy]:
    from tests.servers.proxies import StatusProxy

    with StatusProxy(f"http://{HOST}:{upstream}") as proxy:
        yield proxy


@pytest.mark.real
def test_led_elsewhere_until_healed(fault: Fault, statuses: StatusProxy) -> None:
    """The same port is another server's; healed, it is the first one's again."""
    assert get(fault.port) == "GET /a HTTP/1.1|"
    fault.lead_to(statuses.port)
    statuses.inject(473)
    assert httpx.get(f"http://{HOST}:{fault.port}/a", timeout=30, trust_env=False).status_code == 473
    fault.heal()
    assert get(fault.port) == "GET /a HTTP/1.1|"
    assert len(statuses.arrived) == 1


def test_status_proxy_injects_what_was_asked_for(statuses: StatusProxy) -> None:
    """The chosen number of requests to the chosen paths gets the status and the headers; others pass."""
    statuses.inject(473, times=2, part="/encrypt/")
    statuses.inject(429, headers={"Retry-After": "7"})
    with httpx.Client(base_url=statuses.url, trust_env=False) as client:
        assert [client.post("/v1/encrypt/a").status_code for _ in range(2)] == [473, 473]
        limited = client.get("/v1/decrypt/a")
        assert (limited.status_code, limited.headers["Retry-After"]) == (429, "7")
        passed = client.post("/v1/encrypt/a", content=b"body")
    assert passed.text == "POST /v1/encrypt/a HTTP/1.1|body"
    assert [arrival.status for arrival in statuses.arrived] == [473, 473, 429, 200]
    assert [arrival.injected for arrival in statuses.arrived] == [True, True, True, False]


@pytest.mark.parametrize("target", ["/v1/../sys", "/a%2e%2e%2Fb?x=%20", "//host/a%0Ab", "/%C3%A9+*"])
def test_status_proxy_passes_paths_as_they_are(statuses: StatusProxy, target: str) -> None:
    """Hostile paths are recorded and arrive as they were sent, under any method."""
    extensions = {"target": target.encode()}
    with httpx.Client(trust_env=False) as client:
        answer = client.request("LIST", statuses.url, extensions=extensions)
    assert answer.text == f"LIST {target} HTTP/1.1|"
    assert [(arrival.method, arrival.path) for arrival in statuses.arrived] == [("LIST", target)]


def test_status_proxy_without_an_upstream_is_a_bad_gateway() -> None:
    """An upstream that does not answer is a 502 that says so: no status of the upstream's."""
    from tests.servers.proxies import StatusProxy

    with StatusProxy(f"http://{HOST}:{free_port()}") as proxy:
        answer = httpx.get(proxy.url, trust_env=False)
    assert answer.status_code == 502
    assert "no answer from the upstream" in answer.text


def test_status_proxy_speaks_tls_both_ways(upstream: int, tmp_path: Path) -> None:
    """With a certificate it serves https, and its upstream's is checked against the given authority."""
    from tests.servers.proxies import StatusProxy

    certify(tmp_path)
    authority, files = tmp_path / "ca.pem", (tmp_path / "server.pem", tmp_path / "server.key")
    context = ssl.create_default_context(cafile=authority)
    with StatusProxy(f"http://{HOST}:{upstream}", certificate=files) as inner:
        trusting = StatusProxy(inner.url, authority=authority, certificate=files)
        with trusting, httpx.Client(verify=context, trust_env=False) as client:
            assert client.get(f"{trusting.url}/a").text == "GET /a HTTP/1.1|"
        wary = StatusProxy(inner.url, certificate=files)
        with wary, httpx.Client(verify=context, trust_env=False) as client:
            assert "CERTIFICATE_VERIFY_FAILED" in client.get(wary.url).text
    assert [arrival.path for arrival in inner.arrived] == ["/a"]


@pytest.mark.real
def test_vault_behind_both_kinds_of_fault(vault_server: VaultServer, toxiproxy: Toxiproxy) -> None:
    """Vault is reached through both with its own certificate; each does its harm, and then heals."""
    from tests.servers.proxies import StatusProxy

    context = ssl.create_default_context(cafile=vault_server.ca_file)
    files = vault_server.certificate
    with (
        toxiproxy.proxy(vault_server.port) as fault,
        StatusProxy(
            f"https://{HOST}:{fault.port}", authority=vault_server.ca_file, certificate=files
        ) as proxy,
        httpx.Client(base_url=proxy.url, verify=context, trust_env=False, timeout=30) as client,
    ):
        proxy.inject(473)
        fault.cut()
        assert [client.get("/v1/sys/health").status_code for _ in range(2)] == [473, 502]
        fault.heal()
        assert client.get("/v1/sys/health").json()["sealed"] is False
