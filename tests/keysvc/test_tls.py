"""HTTPS of the service: an authority of its own is trusted by name, a renewed certificate used at once."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from tests.servers.kube import write_certificates

from anamorph.errors import SetupError
from anamorph.wire import calls
from anamorph_keysvc import tls

app = FastAPI()


@app.get("/who")
async def who(request: Request) -> str:
    return request.headers.get("Authorization", "")


@pytest.fixture
def certificate(tmp_path: Path) -> tls.Certificate:
    write_certificates(tmp_path)
    found = tls.opened(tmp_path / "server.crt", tmp_path / "server.key")
    assert found is not None
    return found


@contextmanager
def serving(certificate: tls.Certificate) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_config=None)
        certificate.serve(config)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def shown(port: int) -> str:
    return ssl.get_server_certificate(("127.0.0.1", port)).strip()


def test_our_authority_is_trusted_when_it_is_named(
    certificate: tls.Certificate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ANAMORPH_CA_FILE our clients believe the service; without it they do not."""
    with serving(certificate) as port:
        url = f"https://127.0.0.1:{port}"
        monkeypatch.delenv("ANAMORPH_CA_FILE", raising=False)
        with httpx.Client(**calls.client_options(url, None)) as http, pytest.raises(httpx.ConnectError):
            http.get("/who")
        monkeypatch.setenv("ANAMORPH_CA_FILE", str(tmp_path / "ca.crt"))
        with httpx.Client(**calls.client_options(url, None)) as http:
            assert http.get("/who").json() == ""


def test_a_file_without_certificates_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the variable and the file."""
    monkeypatch.setenv("ANAMORPH_CA_FILE", str(tmp_path / "none"))
    with pytest.raises(SetupError, match=r"ANAMORPH_CA_FILE: .*none holds no PEM"):
        calls.client_options("https://keys", None)


def test_a_token_in_a_file_is_read_anew(
    certificate: tls.Certificate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A projected token is replaced while the client lives."""
    monkeypatch.setenv("ANAMORPH_CA_FILE", str(tmp_path / "ca.crt"))
    file = tmp_path / "token"
    with (
        serving(certificate) as port,
        httpx.Client(**calls.client_options(f"https://127.0.0.1:{port}", file)) as http,
    ):
        for token in ("token-one", "token-two"):
            file.write_text(f"{token}\n")
            assert http.get("/who").json() == f"Bearer {token}"


def test_a_renewed_certificate_is_used(certificate: tls.Certificate, tmp_path: Path) -> None:
    """New connections get it as soon as it has been looked for, and nothing is loaded twice."""
    with serving(certificate) as port:
        first = shown(port)
        write_certificates(tmp_path)
        assert shown(port) == first
        assert certificate.refresh()
        assert shown(port) == (tmp_path / "server.crt").read_text().strip() != first
        assert not certificate.refresh()


def test_what_does_not_fit_changes_nothing(certificate: tls.Certificate, tmp_path: Path) -> None:
    """Files that are half replaced are left alone; the old certificate goes on."""
    with serving(certificate) as port:
        first = shown(port)
        (tmp_path / "new").mkdir()
        write_certificates(tmp_path / "new")
        (tmp_path / "server.crt").write_text((tmp_path / "new" / "server.crt").read_text())
        assert not certificate.refresh()
        assert shown(port) == first


@pytest.mark.parametrize("names", [("server.crt", None), (None, "server.key"), ("server.crt", "none")])
def test_half_a_certificate_is_refused(
    names: tuple[str | None, str | None], certificate: tls.Certificate, tmp_path: Path
) -> None:
    """Both files, and such as belong together, or neither."""
    assert certificate.refresh() is False
    with pytest.raises(SetupError):
        tls.opened(*(None if name is None else tmp_path / name for name in names))
