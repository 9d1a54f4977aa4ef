"""An OIDC issuer with real keys behind a real HTTP server, and a real Kubernetes API server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from tests.servers.kube import ApiServer, running_apiserver

from anamorph_keysvc.identity.oidc import OidcIssuer
from anamorph_keysvc.identity.settings import OidcSettings

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
AUDIENCE = "anamorph-keysvc"
ROLES = {"keys-admin": "admin", "keys-rotator": "rotator", "keys-platform": "platform"}


@dataclass
class Ticks:
    """A monotonic clock that moves only when told."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Issuer:
    """An issuer that tests can break: ``answers`` replaces a path's answer by (status, headers, body)."""

    url: str
    keys: dict[str, tuple[PrivateKey, str]] = field(default_factory=dict)
    answers: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    open: threading.Event = field(default_factory=threading.Event)
    """While it is clear, nothing is answered."""

    def add(self, kid: str, key: PrivateKey, algorithm: str) -> None:
        self.keys[kid] = (key, algorithm)

    def jwk(self, kid: str) -> dict[str, Any]:
        key, algorithm = self.keys[kid]
        public = jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key(), as_dict=True)
        return {**public, "kid": kid, "use": "sig", "alg": algorithm}

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(path)
        self.open.wait(10)
        if path in self.answers:
            return self.answers[path]
        documents: dict[str, Any] = {
            "/.well-known/openid-configuration": {"issuer": self.url, "jwks_uri": f"{self.url}/jwks"},
            "/jwks": {"keys": [self.jwk(kid) for kid in self.keys]},
        }
        return 200, {}, json.dumps(documents[path]).encode()

    def down(self, path: str = "/jwks") -> None:
        self.answers[path] = (503, {}, b"")

    def up(self) -> None:
        self.answers.clear()

    def claims(self, **changed: Any) -> dict[str, Any]:
        """The claims of a good token; a claim that is set to None is left out."""
        now = int(time.time())
        good = {"iss": self.url, "aud": AUDIENCE, "sub": "alice", "iat": now, "exp": now + 300}
        return {k: v for k, v in {**good, "groups": ["keys-admin"], **changed}.items() if v is not None}

    def token(self, kid: str = "rsa", *, headers: dict[str, Any] | None = None, **changed: Any) -> str:
        key, algorithm = self.keys[kid]
        return jwt.encode(self.claims(**changed), key, algorithm, {"kid": kid, **(headers or {})})

    def settings(self, **changed: Any) -> OidcSettings:
        good = {
            "name": "idp",
            "issuer": self.url,
            "audiences": [AUDIENCE],
            "algorithms": ["RS256", "ES256", "EdDSA"],
            "tenant": "acme",
            "roles_claim": "groups",
            "roles": {"keys-admin": "admin", "keys-rotator": "rotator"},
            "leeway_s": 5,
        }
        return OidcSettings.model_validate({**good, **changed})


class _Handler(BaseHTTPRequestHandler):
    issuer: Issuer

    def do_GET(self) -> None:
        status, headers, body = self.issuer.answer(self.path)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: Any) -> None:
        """Quiet."""


@pytest.fixture(scope="session")
def private_keys() -> dict[str, tuple[PrivateKey, str]]:
    """Made once: RSA keys take a while."""
    return {
        "rsa": (rsa.generate_private_key(public_exponent=65537, key_size=2048), "RS256"),
        "ec": (ec.generate_private_key(ec.SECP256R1()), "ES256"),
        "ed": (ed25519.Ed25519PrivateKey.generate(), "EdDSA"),
    }


@pytest.fixture
def issuer(private_keys: dict[str, tuple[PrivateKey, str]]) -> Iterator[Issuer]:
    class Handler(_Handler):
        pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made = Issuer(f"http://127.0.0.1:{server.server_port}", dict(private_keys))
        made.open.set()
        Handler.issuer = made
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.open.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def ticks() -> Ticks:
    return Ticks()


@pytest.fixture
def trusting(issuer: Issuer, ticks: Ticks) -> Iterator[Callable[..., OidcIssuer]]:
    """Makes the verifying side of the issuer, with settings changed as wanted."""
    made: list[OidcIssuer] = []

    def make(**changed: Any) -> OidcIssuer:
        made.append(OidcIssuer(issuer.settings(**changed), development=True, clock=ticks))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def oidc(trusting: Callable[..., OidcIssuer]) -> OidcIssuer:
    return trusting()


@pytest.fixture(scope="session")
def apiserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with running_apiserver(tmp_path_factory.mktemp("kube")) as server:
        yield server
