"""A renewed certificate of Serve's proxy, in the server that Ray starts: uvicorn, behind our middleware."""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from tests.servers.kube import write_certificates

from anamorph.serve.cluster.proxy import middlewares
from anamorph.serve.cluster.renewal import FOLDER, Renewal
from anamorph.wire.certificate import REFRESH_S

Http = Literal["h11", "httptools"]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("yes")(scope, receive, send)


def put(folder: Path) -> str:
    """A new certificate in a folder, named as in a Secret; its text."""
    write_certificates(folder)
    for kind in ("crt", "key"):
        (folder / f"server.{kind}").rename(folder / f"tls.{kind}")
    return (folder / "tls.crt").read_text().strip()


@contextmanager
def serving(app: ASGIApp, folder: Path, http: Http) -> Iterator[int]:
    """What ``start_asgi_http_server`` of Ray does, on a port of ours."""
    config = uvicorn.Config(
        lambda: app,
        factory=True,
        host="127.0.0.1",
        port=0,
        http=http,
        lifespan="off",
        log_config=None,
        ssl_certfile=folder / "tls.crt",
        ssl_keyfile=folder / "tls.key",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def shown(port: int) -> str:
    return ssl.get_server_certificate(("127.0.0.1", port)).strip()


def ask(port: int) -> None:
    """As a probe asks: it does not look at the certificate."""
    assert httpx.get(f"https://127.0.0.1:{port}/-/healthz", verify=False).text == "yes"


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_a_request_has_the_server_take_a_renewed_certificate(tmp_path: Path, http: Http) -> None:
    """Not at once, but once a minute; files that do not fit are left alone until they do."""
    clock, first = Clock(), put(tmp_path)
    with serving(Renewal(answer, tmp_path, clock), tmp_path, http) as port:
        second = put(tmp_path)
        ask(port)
        assert shown(port) == first
        clock.now += REFRESH_S
        ask(port)
        assert shown(port) == second != first
        (tmp_path / "tls.crt").write_text(first)
        clock.now += REFRESH_S
        ask(port)
        assert shown(port) == second
        third = put(tmp_path)
        clock.now += REFRESH_S
        ask(port)
        assert shown(port) == third


async def test_a_server_that_does_not_show_its_certificate_goes_on_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock, _ = Clock(), put(tmp_path)
    transport = httpx.ASGITransport(Renewal(answer, tmp_path, clock))
    clock.now += REFRESH_S
    with caplog.at_level(logging.WARNING):
        async with httpx.AsyncClient(transport=transport, base_url="https://it") as client:
            assert (await client.get("/")).text == "yes"
    assert "restart the pod" in caplog.text


def wrapped(app: ASGIApp) -> ASGIApp:
    """As Ray does it: the last of the list is asked first."""
    for one in middlewares():
        make: Any = one.cls
        app = make(app, *one.args, **one.kwargs)
    return app


def test_rays_proxy_looks_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked before what shapes answers, which would hide the server's own way to send."""
    monkeypatch.delenv(FOLDER, raising=False)
    assert not isinstance(wrapped(answer), Renewal)
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with pytest.raises(FileNotFoundError):
        wrapped(answer)
    put(tmp_path)
    assert isinstance(wrapped(answer), Renewal)
