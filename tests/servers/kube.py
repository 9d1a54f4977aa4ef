"""A real Kubernetes API server over a real etcd, on loopback, with an admin and service-account tokens."""

from __future__ import annotations

import ipaddress
import json
import secrets
import ssl
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from kubernetes import client
from tests.servers.find import binary
from tests.servers.process import Program, free_port

ISSUER = "https://kubernetes.default.svc.cluster.local"
REVIEWERS = "system:auth-delegator"
AUDIT = "audit.log"


@dataclass
class ApiServer:
    """A running API server. Its namespaces are never deleted: no controller runs."""

    url: str
    ca_file: Path
    admin: client.ApiClient
    program: Program
    signing_key: rsa.RSAPrivateKey
    _namespaces: set[str] = field(default_factory=set)

    def account(self, namespace: str, name: str | None = None) -> str:
        """Create a service account, its namespace if needed, and answer its name."""
        core, name = client.CoreV1Api(self.admin), name or f"job-{uuid.uuid4().hex[:8]}"
        if namespace not in self._namespaces:
            core.create_namespace({"metadata": {"name": namespace}})
            self._namespaces.add(namespace)
        core.create_namespaced_service_account(namespace, {"metadata": {"name": name}})
        return name

    def delete_account(self, namespace: str, name: str) -> None:
        """Delete a service account: its tokens end with it."""
        client.CoreV1Api(self.admin).delete_namespaced_service_account(name, namespace)

    def token(self, namespace: str, name: str, audiences: Sequence[str] = (), seconds: int = 600) -> str:
        """A bound token from TokenRequest, for the API server itself if no audience is given."""
        spec = {"audiences": list(audiences), "expirationSeconds": seconds}
        answer = client.CoreV1Api(self.admin).create_namespaced_service_account_token(
            name, namespace, {"spec": spec}
        )
        token: str = answer.status.token
        return token

    def forge(self, token: str, **claims: Any) -> str:
        """A token as the API server itself would sign it, with other claims, such as one that is over."""
        changed = jwt.decode(token, options={"verify_signature": False}) | claims
        kid = jwt.get_unverified_header(token)["kid"]
        return jwt.encode(changed, self.signing_key, algorithm="RS256", headers={"kid": kid})

    def allow_reviews(self, namespace: str, name: str) -> None:
        """Let a service account review tokens."""
        client.RbacAuthorizationV1Api(self.admin).create_cluster_role_binding(
            {
                "metadata": {"name": f"reviewer-{uuid.uuid4().hex[:8]}"},
                "roleRef": {
                    "apiGroup": "rbac.authorization.k8s.io",
                    "kind": "ClusterRole",
                    "name": REVIEWERS,
                },
                "subjects": [{"kind": "ServiceAccount", "namespace": namespace, "name": name}],
            }
        )


@contextmanager
def running_apiserver(folder: Path, audited: str | None = None) -> Iterator[ApiServer]:
    """An API server of its own, with all its files in ``folder``; both programs end with the block.

    Args:
        folder: an empty one.
        audited: a user each of whose requests is noted in the file ``AUDIT`` there.
    """
    apiserver, etcd = binary("kube-apiserver"), binary("etcd")
    store, port = f"http://127.0.0.1:{free_port()}", free_port()
    signing_key, admin_token = _write_files(folder), secrets.token_hex(16)
    (folder / "tokens.csv").write_text(f'{admin_token},admin,1,"system:masters"\n')
    database = Program(_etcd(etcd, folder, store), folder / "etcd.log")
    command = [*_apiserver(apiserver, folder, store, port), *_audit(folder, audited)]
    server = Program(command, folder / "apiserver.log")
    url, ca_file = f"https://127.0.0.1:{port}", folder / "ca.crt"
    try:
        database.start(lambda: _answers(f"{store}/health"))
        server.start(lambda: _answers(f"{url}/readyz", ca_file))
        with _admin(url, ca_file, admin_token) as admin:
            yield ApiServer(url, ca_file, admin, server, signing_key)
    finally:
        server.stop()
        database.stop()


@contextmanager
def _admin(url: str, ca_file: Path, token: str) -> Iterator[client.ApiClient]:
    configuration = client.Configuration()
    configuration.host, configuration.ssl_ca_cert, configuration.proxy = url, str(ca_file), None
    configuration.api_key = {"BearerToken": f"Bearer {token}"}
    with client.ApiClient(configuration) as admin:
        _await_defaults(admin)
        yield admin
        admin.rest_client.pool_manager.clear()


def _await_defaults(admin: client.ApiClient) -> None:
    """The API server makes its own ClusterRoles a moment after it says that it is ready."""
    rbac, end = client.RbacAuthorizationV1Api(admin), time.monotonic() + 60
    while time.monotonic() < end:
        with suppress(client.ApiException):
            rbac.read_cluster_role(REVIEWERS)
            return
        time.sleep(0.1)
    raise RuntimeError(f"the API server made no ClusterRole {REVIEWERS}")


def _etcd(program: Path, folder: Path, store: str) -> list[str]:
    peer = f"http://127.0.0.1:{free_port()}"
    return [
        *(str(program), "--data-dir", str(folder / "etcd"), "--unsafe-no-fsync"),
        *("--listen-client-urls", store, "--advertise-client-urls", store),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        *("--initial-cluster", f"default={peer}"),
    ]


def _apiserver(program: Path, folder: Path, store: str, port: int) -> list[str]:
    options = {
        "etcd-servers": store,
        "bind-address": "127.0.0.1",
        "secure-port": port,
        "tls-cert-file": folder / "server.crt",
        "tls-private-key-file": folder / "server.key",
        "token-auth-file": folder / "tokens.csv",
        "authorization-mode": "RBAC",
        "service-account-issuer": ISSUER,
        "service-account-key-file": folder / "accounts.key",
        "service-account-signing-key-file": folder / "accounts.key",
        "service-cluster-ip-range": "10.96.0.0/16",
        "endpoint-reconciler-type": "none",  # the usual one refuses to advertise a loopback address
        "anonymous-auth": "true",  # for /readyz
        "profiling": "false",
    }
    return [str(program), *(f"--{name}={value}" for name, value in options.items())]


def _audit(folder: Path, user: str | None) -> list[str]:
    if user is None:
        return []
    rules = [{"level": "Metadata", "users": [user]}, {"level": "None"}]
    policy = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"]}
    (folder / "audit.yaml").write_text(json.dumps({**policy, "rules": rules}))
    return [f"--audit-policy-file={folder / 'audit.yaml'}", f"--audit-log-path={folder / AUDIT}"]


def _answers(url: str, ca_file: Path | None = None) -> bool:
    try:
        return httpx.get(url, verify=_trusting(ca_file), trust_env=False, timeout=5).is_success
    except httpx.HTTPError:
        return False


def _trusting(ca_file: Path | None) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca_file)


def _write_files(folder: Path) -> rsa.RSAPrivateKey:
    """Certificates, and the key that signs service-account tokens, which is returned."""
    write_certificates(folder)
    accounts = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    (folder / "accounts.key").write_bytes(_pem(accounts))
    return accounts


def write_certificates(folder: Path) -> None:
    """A certificate for 127.0.0.1 with its key, and its authority: ``server.crt|key``, ``ca.crt``."""
    folder.mkdir(parents=True, exist_ok=True)
    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    (folder / "server.key").write_bytes(_pem(server))
    for name, cert in {
        "ca.crt": _certificate("authority", authority.public_key(), authority, ca=True),
        "server.crt": _certificate("server", server.public_key(), authority, ca=False),
    }.items():
        (folder / name).write_bytes(cert.public_bytes(serialization.Encoding.PEM))


def _pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )


def _certificate(
    name: str, key: ec.EllipticCurvePublicKey, authority: ec.EllipticCurvePrivateKey, *, ca: bool
) -> x509.Certificate:
    now = datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
    usage = x509.KeyUsage(not ca, False, False, False, False, ca, ca, False, False)
    return (
        x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False
        )
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(authority, hashes.SHA256())
    )
