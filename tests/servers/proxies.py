"""Faults before real servers: on their TCP connections (toxiproxy), and in their HTTP answers (our own)."""

from __future__ import annotations

import secrets
import signal
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Router
from tests.servers.find import binary
from tests.servers.process import PATIENCE_S, Program, free_port

HOST = "127.0.0.1"
Stream = Literal["upstream", "downstream"]  # requests and answers
# Headers of one hop, and those that httpx writes anew because it has decoded the body.
HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "content-length"}
DECODED = {"content-encoding"}
CREDENTIALS = frozenset({"x-vault-token", "authorization", "cookie"})


@dataclass
class Fault:
    """A port before ``upstream``, and what goes wrong on it; faults add up until ``heal``.

    TLS passes through: the certificate of a server on 127.0.0.1 is good for this port too.
    """

    port: int
    name: str
    upstream: str
    _api: httpx.Client = field(repr=False)

    def latency(self, milliseconds: int, stream: Stream = "downstream") -> None:
        """Everything that flows that way comes later by so much."""
        self._add("latency", {"latency": milliseconds}, stream)

    def reset_peer(self, stream: Stream = "upstream") -> None:
        """Reset each new connection when it is used; one that is open already ends, in order, when used.

        Args:
            stream: ``downstream`` lets the request through, so that the server acts and its answer is lost.
        """
        self._add("reset_peer", {"timeout": 0}, stream)

    def hang(self, stream: Stream | None = None) -> None:
        """Half-open: connections open and stay, and nothing comes through; one that the server ends, ends.

        Args:
            stream: ``downstream`` alone lets requests through, so that the server acts and only its
                answers are lost; None stops both.
        """
        for way in [stream] if stream else ["upstream", "downstream"]:
            self._add("timeout", {"timeout": 0}, way)

    def cut(self) -> None:
        """End all connections and refuse new ones."""
        self._set(enabled=False)

    def lead_to(self, port: int) -> None:
        """End all connections; new ones go to another loopback port, such as that of a ``StatusProxy``."""
        self._set(upstream=f"{HOST}:{port}")

    def heal(self) -> None:
        """As new. Connections that hung are closed: what was lost on them is lost."""
        for toxic in self._call("GET", "/toxics").json():
            self._call("DELETE", f"/toxics/{toxic['name']}")
        self._set(enabled=True, upstream=self.upstream)

    def _add(self, kind: str, attributes: dict[str, int], stream: str) -> None:
        self._call("POST", "/toxics", {"type": kind, "stream": stream, "attributes": attributes})

    def _set(self, **changes: object) -> None:
        self._call("POST", "", changes)

    def _call(self, method: str, path: str, body: Any = None) -> httpx.Response:
        return self._api.request(method, f"/proxies/{self.name}{path}", json=body).raise_for_status()


@dataclass(frozen=True)
class Toxiproxy:
    """A running toxiproxy."""

    api: httpx.Client

    @contextmanager
    def proxy(self, upstream: int) -> Iterator[Fault]:
        """A healthy port before the loopback port ``upstream``, closed at the end."""
        name, port, server = f"fault-{secrets.token_hex(4)}", free_port(), f"{HOST}:{upstream}"
        proxy = {"name": name, "listen": f"{HOST}:{port}", "upstream": server, "enabled": True}
        self.api.post("/proxies", json=proxy).raise_for_status()
        try:
            yield Fault(port, name, server, self.api)
        finally:
            self.api.delete(f"/proxies/{name}").raise_for_status()


@contextmanager
def running_toxiproxy(folder: Path) -> Iterator[Toxiproxy]:
    """toxiproxy-server, stopped at the end; its log is in ``folder``."""
    port = free_port()
    command = [str(binary("toxiproxy-server")), "-host", HOST, "-port", str(port)]
    program = Program(command, folder / "toxiproxy.log")
    # trust_env off: a proxy of this machine's user is not asked for loopback ports.
    with httpx.Client(base_url=f"http://{HOST}:{port}", trust_env=False, timeout=30) as api:
        try:
            program.start(lambda: _answers(api))
            yield Toxiproxy(api)
        finally:
            program.stop(signal.SIGTERM)


def _answers(api: httpx.Client) -> bool:
    try:
        return api.get("/version").is_success
    except httpx.TransportError:
        return False


@dataclass(frozen=True)
class Arrival:
    """A request as it reached the proxy: its path as written, query included; the status it got.

    ``headers`` are those that the proxy was asked to keep, in lower case.
    """

    method: str
    path: str
    status: int
    injected: bool
    headers: dict[str, str]


@dataclass
class Injection:
    """Requests that are answered by the proxy itself: the next ``times`` whose path has ``part`` in it."""

    status: int
    times: int
    part: str
    headers: dict[str, str]


class StatusProxy:
    """A reverse proxy on a loopback port that passes requests on, and answers some with a chosen status.

    Toxiproxy works on TCP, below the statuses of HTTP. With a certificate this one speaks TLS, so
    that a client under test is configured as in production; the certificate may be the upstream's
    own, since both are 127.0.0.1.

    Args:
        upstream: the server's URL, such as https://127.0.0.1:8200.
        authority: the file of the authority that signed the upstream's certificate, for https.
        certificate: the files of this proxy's certificate and key; plain HTTP without.
        keep: headers to be kept of each arrival, in lower case; never one that is a credential.
    """

    def __init__(
        self,
        upstream: str,
        *,
        authority: Path | None = None,
        certificate: tuple[Path, Path] | None = None,
        keep: frozenset[str] = frozenset(),
    ) -> None:
        assert not keep & CREDENTIALS, "what is kept is shown where a test fails"
        self.arrived: list[Arrival] = []
        self._keep = keep
        self._upstream, self._authority = upstream, authority
        self._injections: list[Injection] = []
        self._lock = threading.Lock()
        self._socket = socket.create_server((HOST, 0))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"{'https' if certificate else 'http'}://{HOST}:{self.port}"
        certfile, keyfile = certificate or (None, None)
        # h11 takes any method: Vault has one of its own, LIST.
        app = Router(default=self._answer, lifespan=self._lifespan, redirect_slashes=False)
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            log_level="error",
            timeout_graceful_shutdown=2,
            ssl_certfile=certfile,
            ssl_keyfile=str(keyfile) if keyfile else None,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})

    def inject(
        self, status: int, *, times: int = 1, part: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """Answer the next ``times`` requests whose path contains ``part`` with ``status``, Vault's error body
        and these headers; the first injection that fits is used up first."""
        with self._lock:
            self._injections.append(Injection(status, times, part, headers or {}))

    def heal(self) -> None:
        """Pass everything on again, and forget what arrived."""
        with self._lock:
            self._injections.clear()
            self.arrived.clear()

    def __enter__(self) -> StatusProxy:
        self._thread.start()
        end = time.monotonic() + PATIENCE_S
        while not self._server.started:
            assert self._thread.is_alive(), "the proxy ended while it started"
            assert time.monotonic() < end, "the proxy did not start"
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    @asynccontextmanager
    async def _lifespan(self, _: object) -> AsyncIterator[None]:
        verify = ssl.create_default_context(cafile=self._authority)
        async with httpx.AsyncClient(verify=verify, trust_env=False, timeout=60) as self._client:
            yield

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        path = _target(scope)
        injection = self._take(path)
        response = _injected(injection) if injection else await self._forward(request, path)
        kept = {name: value for name, value in request.headers.items() if name in self._keep}
        self.arrived.append(Arrival(request.method, path, response.status_code, injection is not None, kept))
        await response(scope, receive, send)

    def _take(self, path: str) -> Injection | None:
        with self._lock:
            for injection in self._injections:
                if injection.times > 0 and injection.part in path:
                    injection.times -= 1
                    return injection
        return None

    async def _forward(self, request: Request, path: str) -> Response:
        try:
            answer = await self._client.request(
                request.method,
                self._upstream,
                content=await request.body(),
                headers=[
                    (name, value) for name, value in request.headers.items() if name not in HOP | {"host"}
                ],
                # httpx would tidy the path up: hostile ones are to arrive as they were sent.
                extensions={"target": path.encode("latin-1")},
            )
        except httpx.TransportError as error:
            return JSONResponse({"errors": [f"no answer from the upstream: {error!r}"]}, 502)
        kept = {name: value for name, value in answer.headers.items() if name not in HOP | DECODED}
        return Response(answer.content, answer.status_code, kept)


def _injected(injection: Injection) -> Response:
    return JSONResponse({"errors": ["injected by the tests"]}, injection.status, injection.headers)


def _target(scope: Any) -> str:
    """What stood in the request line: nothing decoded, nothing tidied up."""
    path: bytes = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    return path.decode("latin-1")
