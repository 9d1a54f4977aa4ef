"""A real Vault server on free loopback ports: raft storage, TLS by an authority of its own, audit device."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tests.servers.find import binary
from tests.servers.process import Program, free_port

HOST = "127.0.0.1"
CONFIG = """\
ui = false
disable_mlock = true
api_addr = "https://{host}:{port}"
cluster_addr = "https://{host}:{cluster_port}"
storage "raft" {{ path = "{data}"  node_id = "one" }}
listener "tcp" {{
  address = "{host}:{port}"
  cluster_address = "{host}:{cluster_port}"
  tls_cert_file = "{certificate}"
  tls_key_file = "{key}"
}}
"""


@dataclass
class VaultServer:
    """One node, initialised with one unseal key."""

    folder: Path
    port: int = field(default_factory=free_port)
    root_token: str = field(default="", repr=False)
    unseal_key: str = field(default="", repr=False)
    _program: Program = field(init=False, repr=False)

    def __post_init__(self) -> None:
        config = self.folder / "vault.hcl"
        self._program = Program(
            [str(binary("vault")), "server", f"-config={config}"],
            self.folder / "vault.log",
            {"HOME": str(self.folder), "PATH": "/usr/bin:/bin"},
        )

    @property
    def url(self) -> str:
        return f"https://{HOST}:{self.port}"

    @property
    def ca_file(self) -> Path:
        """The authority's certificate, which alone is to be trusted."""
        return self.folder / "ca.pem"

    @property
    def certificate(self) -> tuple[Path, Path]:
        """Certificate and key for 127.0.0.1: also good for a proxy before this server."""
        return self.folder / "server.pem", self.folder / "server.key"

    @property
    def audit_log(self) -> Path:
        return self.folder / "audit.log"

    @property
    def log(self) -> Path:
        return self.folder / "vault.log"

    @property
    def pid(self) -> int:
        return self._program.pid

    def client(self, token: str | None = None) -> httpx.Client:
        """Calls below ``/v1/`` with a token, the root token if None; close it."""
        context = ssl.create_default_context(cafile=self.ca_file)
        headers = {"X-Vault-Token": self.root_token if token is None else token}
        url = f"{self.url}/v1/"
        return httpx.Client(base_url=url, verify=context, headers=headers, trust_env=False, timeout=30)

    def ask(self, method: str, path: str, body: Any = None, *, headers: Any = None) -> Any:
        """What root is answered; ``{}`` for nothing. AssertionError with Vault's words where it refuses."""
        with self.client() as client:
            answer = client.request(method, path, json=body, headers=headers)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else {}

    def seal(self) -> None:
        self.ask("POST", "sys/seal")

    def unseal(self) -> None:
        """Unseal and wait until it answers again; nothing happens to one that is unsealed."""
        self.ask("POST", "sys/unseal", {"key": self.unseal_key})
        self._program.wait_until(self.active)

    def start(self) -> None:
        """Start it as it was left: sealed, unless it is new."""
        self._program.start(self._listens)

    def stop(self) -> None:
        self._program.stop()

    def restart(self) -> None:
        """Stop, start, unseal."""
        self.stop()
        self.start()
        self.unseal()

    def active(self) -> bool:
        """Unsealed, and leading its cluster of one."""
        return self._health() == 200

    def _listens(self) -> bool:
        return self._health() != 0

    def _health(self) -> int:
        try:
            with self.client("none") as client:
                return client.get("sys/health").status_code
        except httpx.TransportError:
            return 0


@contextmanager
def running_vault(folder: Path, *, audit: bool = True) -> Iterator[VaultServer]:
    """An unsealed server with an empty data folder, stopped at the end.

    Args:
        folder: of data, certificates and logs.
        audit: whether an audit device writes to ``audit_log``.
    """
    server = VaultServer(folder)
    certify(folder)
    (folder / "data").mkdir()
    certificate, key = server.certificate
    values = {"data": folder / "data", "certificate": certificate, "key": key, "port": server.port}
    config = CONFIG.format(host=HOST, cluster_port=free_port(), **values)
    (folder / "vault.hcl").write_text(config)
    server.start()
    try:
        made = server.ask("POST", "sys/init", {"secret_shares": 1, "secret_threshold": 1})
        server.root_token, server.unseal_key = made["root_token"], made["keys"][0]
        server.unseal()
        if audit:
            options = {"file_path": str(server.audit_log)}
            server.ask("PUT", "sys/audit/file", {"type": "file", "options": options})
        yield server
    finally:
        server.stop()


def certify(folder: Path) -> None:
    """``ca.pem``, and ``server.pem`` with ``server.key`` for 127.0.0.1, good for a day."""
    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "anamorph tests")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    root = (
        _certificate(issuer, issuer, authority)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority.public_key()), critical=False)
    )
    leaf = (
        _certificate(subject, issuer, key)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address(HOST))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False
        )
    )
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(root.sign(authority, hashes.SHA256()).public_bytes(pem))
    (folder / "server.pem").write_bytes(leaf.sign(authority, hashes.SHA256()).public_bytes(pem))
    plain = serialization.NoEncryption()
    (folder / "server.key").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.TraditionalOpenSSL, plain)
    )


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=1))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
