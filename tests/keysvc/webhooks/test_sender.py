"""One request to a real TLS server: checked addresses, verified names, one deadline."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.keysvc.webhooks.conftest import LOOPBACK
from tests.keysvc.webhooks.receiver import NAME, Authority, Receiver, running_receiver

from anamorph.errors import SetupError
from anamorph_keysvc.webhooks.guard import Guard
from anamorph_keysvc.webhooks.sender import Outcome, Sender, trust


def test_a_request_arrives_as_it_was_meant(receiver: Receiver, sender: Sender) -> None:
    """Method, path, headers, body, and the URL's name in both TLS and HTTP."""
    outcome = sender.post(receiver.url("/hook?a=b"), {"webhook-id": "evt_1"}, b'{"a": 1}')
    assert outcome == Outcome(status=204)
    (got,) = receiver.received
    assert (got.method, got.path, got.body, got.sni) == ("POST", "/hook?a=b", b'{"a": 1}', NAME)
    assert got.headers["host"] == f"{NAME}:{receiver.port}"
    assert got.headers["content-type"] == "application/json"
    assert got.headers["webhook-id"] == "evt_1"
    assert "authorization" not in got.headers


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_never_followed(receiver: Receiver, sender: Sender, status: int) -> None:
    """Not even to the same receiver: one request arrives."""
    receiver.then = status
    receiver.headers = {"Location": receiver.url("/other")}
    outcome = sender.post(receiver.url(), {}, b"{}")
    assert outcome == Outcome(status=status, error="redirects are not followed")
    assert len(receiver.received) == 1


@pytest.mark.parametrize("status", [400, 401, 404, 410, 429, 500, 503])
def test_a_refusal_keeps_its_status(receiver: Receiver, sender: Sender, status: int) -> None:
    """The caller decides what it means."""
    receiver.then, receiver.headers = status, {"Retry-After": "77"}
    outcome = sender.post(receiver.url(), {}, b"{}")
    assert (outcome.status, outcome.delivered, outcome.retry_after) == (status, False, 77.0)


@pytest.mark.parametrize("value", ["-1", "soon", "1e9", "9" * 20, ""])
def test_an_odd_retry_after_counts_as_none(receiver: Receiver, sender: Sender, value: str) -> None:
    """Only whole seconds are understood."""
    receiver.then, receiver.headers = 503, {"Retry-After": value}
    assert sender.post(receiver.url(), {}, b"{}").retry_after is None


def test_a_certificate_of_an_unknown_ca_is_refused(elsewhere: Authority, sender: Sender) -> None:
    """Nothing is sent to it."""
    with running_receiver(elsewhere.server_file) as receiver:
        assert sender.post(receiver.url(), {}, b"{}") == Outcome(error="TLS failed")
    assert receiver.received == []


def test_a_certificate_for_another_name_is_refused(receiver: Receiver, sender: Sender) -> None:
    """The name of the URL is verified, not the address that was connected to."""
    assert sender.post(receiver.url(host="other.test"), {}, b"{}") == Outcome(error="TLS failed")
    assert receiver.received == []


def test_an_address_in_the_url_is_verified_as_an_address(receiver: Receiver, sender: Sender) -> None:
    """The certificate names 127.0.0.1 too."""
    assert sender.post(receiver.url(host="127.0.0.1"), {}, b"{}").delivered
    assert receiver.received[0].headers["host"] == f"127.0.0.1:{receiver.port}"


def test_without_permission_loopback_is_not_even_connected_to(
    receiver: Receiver, authority: Authority
) -> None:
    """The same receiver, name and certificate, and a guard that admits public addresses only."""
    guarded = Sender(Guard(lambda *_: ["127.0.0.1"]), ca_file=authority.ca_file)
    for host in (NAME, "127.0.0.1"):
        assert guarded.post(receiver.url(host=host), {}, b"{}") == Outcome(error="address refused")
    assert receiver.received == []


def test_a_name_that_changes_its_mind_has_no_effect(receiver: Receiver, authority: Authority) -> None:
    """Rebinding: asked once per connection, and connected to what was checked."""
    answers = [["127.0.0.1"], ["169.254.169.254"], ["127.0.0.1"]]
    asked: list[str] = []

    def rebinding(host: str, _port: int) -> list[str]:
        asked.append(host)
        return answers[len(asked) - 1]

    rebound = Sender(Guard(rebinding, allow=LOOPBACK), ca_file=authority.ca_file)
    outcomes = [rebound.post(receiver.url(), {}, b"{}") for _ in answers]
    assert [outcome.error for outcome in outcomes] == [None, "address refused", None]
    assert len(asked) == len(answers)


def test_a_rebinding_name_is_resolved_once_per_connection(receiver: Receiver, authority: Authority) -> None:
    """A public answer for the check and a private one for the connection: there is no second look."""
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    once = Sender(Guard(lambda *_: next(answers), allow=LOOPBACK), ca_file=authority.ca_file)
    assert once.post(receiver.url(), {}, b"{}").delivered
    assert next(answers) == ["10.0.0.1"]


def test_the_next_address_is_tried(receiver: Receiver, authority: Authority) -> None:
    """A receiver with several addresses, the first of which takes no connection."""
    guard = Guard(lambda *_: ["127.0.0.2", "127.0.0.1"], allow=LOOPBACK)
    assert Sender(guard, ca_file=authority.ca_file).post(receiver.url(), {}, b"{}").delivered


def test_a_closed_port_is_no_connection(sender: Sender) -> None:
    """Said in words of ours, without an address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert sender.post(f"https://{NAME}:{port}/", {}, b"{}") == Outcome(error="no connection")


def test_a_server_without_tls_is_refused(sender: Sender) -> None:
    """There is no falling back to plain HTTP."""
    with plain(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") as port:
        assert sender.post(f"https://{NAME}:{port}/", {}, b"{}") == Outcome(error="TLS failed")


@contextmanager
def plain(answer: bytes) -> Iterator[int]:
    """A server that answers whoever connects with ``answer``; an empty one: never, until the end."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(answer)
                ended.wait(20 if not answer else 0)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            ended.set()
            thread.join()


def test_a_server_that_says_nothing_times_out(guard: Guard) -> None:
    """In the middle of TLS already."""
    with plain(b"") as port:
        hurried = Sender(guard, timeout_s=0.3)
        assert hurried.post(f"https://{NAME}:{port}/", {}, b"{}") == Outcome(error="timed out")


def dripping(piece: bytes, gate: threading.Event) -> Callable[[Any], None]:
    """Writes ``piece`` over and over, each just in time for a limit per step, until the gate opens."""

    def drip(wfile: Any) -> None:
        while not gate.wait(0.05):
            wfile.write(piece)
            wfile.flush()

    return drip


@pytest.mark.parametrize("piece", [b"x", b"HTTP/1.1 103 Early Hints\r\n\r\n"])
def test_an_answer_that_drips_ends_at_the_deadline(
    receiver: Receiver, guard: Guard, authority: Authority, piece: bytes
) -> None:
    """One limit over everything: no single step is ever late. Interim answers are no way around it."""
    receiver.answers = [dripping(piece, receiver.gate)]
    hurried = Sender(guard, ca_file=authority.ca_file, timeout_s=0.5)
    assert hurried.post(receiver.url(), {}, b"{}").error in {"timed out", "not answered in HTTP"}


def test_an_endless_body_is_left_unread(receiver: Receiver, sender: Sender) -> None:
    """The status is all that counts; the receiver notices that nobody listens."""
    closed = threading.Event()

    def endless(wfile: Any) -> None:
        wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            while not receiver.gate.is_set():
                wfile.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
        except OSError:
            closed.set()

    receiver.answers = [endless]
    assert sender.post(receiver.url(), {}, b"{}").delivered
    assert closed.wait(10)


@pytest.mark.parametrize("answer", [b"nonsense\r\n\r\n", b"", b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 50_000])
def test_what_is_not_http_is_an_error(receiver: Receiver, sender: Sender, answer: bytes) -> None:
    """Nonsense, nothing, and headers without end."""
    receiver.answers = [lambda wfile: wfile.write(answer)]
    assert sender.post(receiver.url(), {}, b"{}") == Outcome(error="not answered in HTTP")


def test_no_proxy_of_the_environment_is_used(
    receiver: Receiver, sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy would connect to addresses that nobody checked."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert sender.post(receiver.url(), {}, b"{}").delivered


def test_a_ca_file_without_certificates_is_refused(tmp_path: Path) -> None:
    """At start, not at the first delivery."""
    (tmp_path / "empty.pem").write_text("")
    for path in (tmp_path / "empty.pem", tmp_path / "missing.pem"):
        with pytest.raises(SetupError):
            trust(path)
