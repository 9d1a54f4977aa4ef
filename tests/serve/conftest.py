"""An endpoint with the fake engine through ASGI, and a real Ray driven as the operator drives it.

Tokens are signed as the key service signs them.
"""

from __future__ import annotations

import os
import signal
import time
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jwt
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anamorph import telemetry
from anamorph.serve.api.app import build_app
from anamorph.serve.api.endpoint import Endpoint
from anamorph.serve.cluster.local import RayProcess, start_ray, stop_ray
from anamorph.serve.engines.fake import FakeEngine
from anamorph.wire.admin import PublicKey
from anamorph.wire.inference import KEY_ID_HEADER
from anamorph.wire.serving import (
    APP_IMPORT_PATH,
    DOOR_IMPORT_PATH,
    EngineSettings,
    KeyState,
    app_name,
    route_prefix,
)

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


KCV = "0123456789abcdef"


def until(what: str, condition: Callable[[], Any], seconds: float = 90) -> Any:
    """Wait for something to become true; fails by name."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        time.sleep(0.1)
    return value


@dataclass
class Cluster:
    """One Ray, one issuer of tokens, one list of applications."""

    ray: RayProcess
    issuer: Issuer
    apps: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def jwks(self) -> list[dict[str, str]]:
        return [key.model_dump() for key in self.issuer.jwks]

    @property
    def _api(self) -> str:
        return f"{self.ray.dashboard_url}/api/serve/applications/"

    def put(self) -> None:
        body = {
            "proxy_location": "HeadOnly",
            "http_options": self.ray.http_options(),
            "applications": list(self.apps.values()),
        }
        response = httpx.put(self._api, headers=self.ray.headers(), json=body, timeout=60)
        assert response.status_code == 200, response.text

    def state(self, name: str) -> dict[str, Any]:
        found = httpx.get(self._api, headers=self.ray.headers(), timeout=30).json()["applications"]
        return dict(found.get(name, {"status": "ABSENT"}))

    def deploy(self, version: int = 1, *, routed: bool = True, **args: Any) -> str:
        """Put one application of ``acme/smol`` on the list and write it; returns its name."""
        name = app_name("acme", "smol", version)
        defaults: dict[str, Any] = {
            "tenant": "acme",
            "model": "smol",
            "version": version,
            "replica": "fake:?vocab_size=500&delay_ms=2",
            "key_id": f"acme.smol.v{version}.{KCV}",
            "engine": "fake",
            "context_length": 2000,
        }
        self.apps[name] = {
            "name": name,
            "route_prefix": route_prefix("acme", "smol", version) if routed else None,
            "import_path": APP_IMPORT_PATH,
            "args": {**defaults, **args},
            "deployments": [{"name": "engine", "user_config": {"status": "serving", "jwks": self.jwks}}],
        }
        self.put()
        return name

    def replicas(self, version: int = 1) -> int:
        """Replicas of a version's engine that Ray has, whatever their state."""
        deployments = self.state(app_name("acme", "smol", version)).get("deployments", {})
        return len(deployments["engine"]["replicas"]) if "engine" in deployments else 0

    def serve(self, version: int = 1, **args: Any) -> str:
        """``deploy`` and wait until it runs; returns its endpoint."""
        name = self.deploy(version, **args)
        until(name, lambda: self.state(name)["status"] == "RUNNING")
        return self.endpoint(version)

    def remove(self, version: int) -> None:
        name = app_name("acme", "smol", version)
        del self.apps[name]
        self.put()
        until("deletion", lambda: self.state(name)["status"] == "ABSENT")

    def door(self, routes: list[dict[str, Any]]) -> None:
        state = {"jwks": self.jwks, "routes": [{"tenant": "acme", "model": "smol", **r} for r in routes]}
        deployment = {"name": "door", "user_config": state}
        self.apps["door"] = {
            "name": "door",
            "route_prefix": "/",
            "import_path": DOOR_IMPORT_PATH,
            "args": {},
            "deployments": [deployment],
        }
        self.put()
        until("the door", lambda: self.state("door")["status"] == "RUNNING")

    def endpoint(self, version: int = 1) -> str:
        return self.ray.serve_url + route_prefix("acme", "smol", version)

    def token(self, **claims: Any) -> str:
        return self.issuer.token(time.time(), **claims)

    def headers(self, version: int = 1, **claims: Any) -> dict[str, str]:
        key_id = self.apps[app_name("acme", "smol", version)]["args"]["key_id"]
        return {"Authorization": f"Bearer {self.token(**claims)}", KEY_ID_HEADER: key_id}

    def usage(self, version: int = 1) -> dict[str, Any]:
        headers = self.headers(version, sub="operator")
        return dict(httpx.get(f"{self.endpoint(version)}/usage", headers=headers, timeout=30).json())

    def kill_replica(self, version: int = 1) -> int:
        """kill -9 the process that serves a version; returns its pid."""
        pid = until("a replica", lambda: self._replica(version))
        os.kill(pid, signal.SIGKILL)
        return int(pid)

    def _replica(self, version: int) -> int | None:
        # Ray titles a replica's process by application, deployment and what it is doing.
        ours = set(self.ray.pids())
        for process in psutil.process_iter(["cmdline"]):
            title = " ".join(process.info["cmdline"] or [])
            if process.pid in ours and title.startswith("ray::") and f"v{version}:engine" in title:
                return int(process.pid)
        return None

    def logs(self) -> str:
        """Everything that Ray and our code have logged so far."""
        files = [p for p in (self.ray.temp_dir / "session_latest").rglob("*") if p.is_file()]
        texts = [p for p in files if p.suffix in {".log", ".out", ".err", ".json"}]
        return "\n".join(_read(path) for path in texts)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # rotated away in between
        return ""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One Ray for a module, empty of applications."""
    ray = start_ray(tmp_path_factory.mktemp("ray"), num_cpus=4)
    try:
        yield Cluster(ray, Issuer())
    finally:
        stop_ray(ray)
