"""An endpoint with the fake engine, spoken to through ASGI; tokens signed as the key service signs them."""

from __future__ import annotations

from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anamorph import telemetry
from anamorph.serve.endpoint import Endpoint
from anamorph.serve.engines.fake import FakeEngine
from anamorph.serve.openai_api import build_app
from anamorph.wire.admin import PublicKey
from anamorph.wire.inference import KEY_ID_HEADER
from anamorph.wire.serving import EngineSettings, KeyState

KEY_ID = "acme.smol.v1.0123456789abcdef"
NOW = 1_800_000_000.0
VOCAB = 500


@dataclass
class Issuer:
    """Issues inference tokens; ``jwks`` is what the operator would push."""

    kid: str = "k1"
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    @property
    def jwks(self) -> tuple[PublicKey, ...]:
        raw = self.key.public_key().public_bytes_raw()
        return (PublicKey(kid=self.kid, x=urlsafe_b64encode(raw).decode().rstrip("=")),)

    def claims(self, now: float = NOW, **changes: Any) -> dict[str, Any]:
        claims = {
            "iss": "anamorph",
            "aud": "inference",
            "tenant": "acme",
            "model": "smol",
            "sub": "client",
            "iat": int(now),
            "exp": int(now) + 600,
        }
        return {k: v for k, v in {**claims, **changes}.items() if v is not None}

    def token(self, now: float = NOW, **changes: Any) -> str:
        return jwt.encode(self.claims(now, **changes), self.key, algorithm="EdDSA", headers={"kid": self.kid})


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@dataclass
class Served:
    """One endpoint under test and a client that speaks to it."""

    endpoint: Endpoint
    http: httpx.AsyncClient
    issuer: Issuer
    clock: Clock

    def headers(self, **claims: Any) -> dict[str, str]:
        token = {"Authorization": f"Bearer {self.issuer.token(self.clock.now, **claims)}"}
        key_id = self.endpoint.settings.key_id
        return token if key_id is None else {**token, KEY_ID_HEADER: key_id}

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json=fields, headers=self.headers())


@pytest.fixture
def issuer() -> Issuer:
    return Issuer()


@pytest.fixture
def observed() -> Iterator[telemetry.Telemetry]:
    built = telemetry.build("anamorph-test")
    yield built
    built.shutdown()


Serve = Callable[..., Served]


@pytest.fixture
async def serve(issuer: Issuer, observed: telemetry.Telemetry) -> AsyncIterator[Serve]:
    """Build an endpoint; keyword arguments ``engine``, ``status`` or fields of ``EngineSettings``."""
    clients: list[httpx.AsyncClient] = []

    def start(*, engine: Any = None, status: Any = "serving", **fields: Any) -> Served:
        defaults: dict[str, Any] = {
            "tenant": "acme",
            "model": "smol",
            "version": 1,
            "replica": "fake:",
            "engine": "fake",
            "key_id": KEY_ID,
            "context_length": 200,
        }
        settings = EngineSettings.model_validate({**defaults, **fields})
        clock = Clock()
        name = settings.key_id or "plaintext"
        loaded = engine or FakeEngine(name, vocab_size=VOCAB, context_length=200, eos_ids=frozenset({7}))
        endpoint = Endpoint(settings, loaded, observed, clock=clock)
        endpoint.reconfigure(KeyState(status=status, jwks=issuer.jwks))
        transport = httpx.ASGITransport(build_app(endpoint), raise_app_exceptions=False)
        clients.append(httpx.AsyncClient(transport=transport, base_url="http://engine"))
        return Served(endpoint, clients[-1], issuer, clock)

    yield start
    for client in clients:
        await client.aclose()


@pytest.fixture
def served(serve: Serve) -> Served:
    return serve()
