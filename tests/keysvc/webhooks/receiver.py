"""A webhook receiver: a real TLS server on loopback, with a certificate of a CA made for the test."""

from __future__ import annotations

import ipaddress
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

NAME = "receiver.test"


@dataclass(frozen=True)
class Authority:
    """A CA: its certificate as a file, and what a server with a certificate of it needs."""

    ca_file: Path
    server_file: Path


def make_authority(folder: Path, *names: str) -> Authority:
    """A new CA, and a server certificate of it for ``names`` and 127.0.0.1."""
    ca_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
    ca = _certificate(issuer, issuer, ca_key.public_key()).add_extension(x509.BasicConstraints(True, 0), True)
    ca_certificate = ca.add_extension(_usage(ca=True), True).sign(ca_key, hashes.SHA256())
    alternatives: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
    alternatives.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    server = _certificate(subject, issuer, server_key.public_key())
    server = server.add_extension(x509.SubjectAlternativeName(alternatives), False)
    signed = server.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), False
    ).sign(ca_key, hashes.SHA256())
    made = Authority(folder / "ca.pem", folder / "server.pem")
    made.ca_file.write_bytes(ca_certificate.public_bytes(serialization.Encoding.PEM))
    made.server_file.write_bytes(_private(server_key) + signed.public_bytes(serialization.Encoding.PEM))
    return made


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), False)
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(True, False, False, False, False, ca, ca, False, False)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@dataclass(frozen=True)
class Received:
    """One request as it arrived, and the name that its connection asked for."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    sni: str | None


@dataclass
class Receiver:
    """What a server received, and how it answers: ``answers`` in turn, then ``then``.

    An answer is a status, or a function that writes to the connection itself.
    """

    port: int
    received: list[Received] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    then: Any = 204
    headers: dict[str, str] = field(default_factory=dict)
    gate: threading.Event = field(default_factory=threading.Event)

    def url(self, path: str = "/hook", host: str = NAME) -> str:
        return f"https://{host}:{self.port}{path}"


@contextmanager
def running_receiver(server_file: Path) -> Iterator[Receiver]:
    """A receiver on a free port; its threads have ended when the block ends."""
    receiver = Receiver(0)
    asked: dict[int, str | None] = {}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server_file)
    context.sni_callback = lambda connection, name, _: asked.__setitem__(id(connection), name)
    server = _Server(("127.0.0.1", 0), _handler(receiver, asked))
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    receiver.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield receiver
    finally:
        receiver.gate.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that refuse the certificate or go away are part of the tests."""


def _handler(receiver: Receiver, asked: dict[int, str | None]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 10

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            sni = asked.get(id(self.connection))
            receiver.received.append(Received(self.command, self.path, headers, body, sni))
            self.answer(receiver.answers.pop(0) if receiver.answers else receiver.then)

        do_GET = do_POST  # noqa: N815 -- as above

        def answer(self, answer: int | Callable[[Any], None]) -> None:
            self.close_connection = True
            if callable(answer):
                answer(self.wfile)
                return
            self.send_response(answer)
            for name, value in receiver.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- as above
            """Tests say what they need themselves."""

    return Handler
