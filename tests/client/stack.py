"""A key service and engines on real sockets, and a proxy before them, for the tests of this folder."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvicorn
from starlette.datastructures import Headers

from anamorph.client.tokenizer import Tokenizer
from anamorph.errors import NotFound, Unavailable
from anamorph.keys import TenantKey
from anamorph.serve.api.app import build_app
from anamorph.serve.api.endpoint import Endpoint
from anamorph.serve.asgi.answers import refusal
from anamorph.serve.engines.fake import FakeEngine
from anamorph.telemetry import build
from anamorph.wire.admin import (
    Activation,
    ApiKeyCreate,
    KeyVersionRead,
    Materialized,
    ModelCreate,
    Probe,
    Role,
    TenantCreate,
)
from anamorph.wire.keyservice import KeyService, everything
from anamorph.wire.serving import EngineSettings, KeyState, route_prefix
from anamorph_keysvc import homes as keysvc_home
from anamorph_keysvc.app import build_app as build_keysvc
from anamorph_keysvc.homes import Home


class Server:
    """An ASGI application on a free loopback port, in a thread of its own."""

    def __init__(self, app: Any) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(app, log_level="error", ws="none", timeout_graceful_shutdown=2)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self.socket]})

    def __enter__(self) -> Server:
        self._thread.start()
        wait_until(lambda: self._server.started or not self._thread.is_alive())
        assert self._server.started
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join()
        self.socket.close()


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for something that another thread brings about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


class Engines:
    """What the cluster's proxy does: each version's application under its route, nothing elsewhere."""

    def __init__(self) -> None:
        self.apps: dict[str, Any] = {}
        self.endpoints: dict[str, Endpoint] = {}
        self.seen: list[Headers] = []

    def add(self, settings: EngineSettings, engine: Any) -> Endpoint:
        prefix = route_prefix(settings.tenant, settings.model, settings.version)
        telemetry = build("anamorph-engine-test")
        endpoint = Endpoint(settings, engine, telemetry)
        self.endpoints[prefix], self.apps[prefix] = endpoint, build_app(endpoint)
        return endpoint

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        self.seen.append(Headers(scope=scope))
        for prefix, app in self.apps.items():
            if scope["path"].startswith(prefix + "/"):
                await app({**scope, "root_path": prefix}, receive, send)
                return
        await refusal(NotFound("there is nothing here", code="not_found"))(scope, receive, send)


class Stack:
    """A key service and engines on real sockets; the operator's part is played by ``rotate``.

    Args:
        home: of the key service.
        tokenizer: the model's.
        make_engine: called with the key of each version.
    """

    tenant, model = "acme", "chat"

    def __init__(self, home: Path, tokenizer: Tokenizer, make_engine: Callable[..., Any]) -> None:
        self.tokenizer = tokenizer
        self._make_engine = make_engine
        self.engines = Engines()
        self.service = keysvc_home.open_service(
            Home(home), production=False, clock=lambda: datetime.now(UTC), entropy=os.urandom
        )
        self._keysvc = Server(build_keysvc(self.service, build("anamorph-keysvc-test")))
        self._cluster = Server(self.engines)
        self._platform_key = Home(home).platform_key.read_text().strip()

    def __enter__(self) -> Stack:
        self._keysvc.__enter__()
        self._cluster.__enter__()
        self.keysvc_url = self._keysvc.url
        self.platform = KeyService(self.keysvc_url, self._platform_key)
        return self

    def __exit__(self, *_: object) -> None:
        self.platform.close()
        self._cluster.__exit__()
        for endpoint in self.engines.endpoints.values():
            endpoint.engine.close()
        self._keysvc.__exit__()
        self.service.database.close()

    def register(self, **changes: Any) -> None:
        """Create tenant, model, and the keys of its administrator and its client."""
        self.platform.create_tenant(TenantCreate(id=self.tenant))
        keys = {
            role: self.platform.create_api_key(self.tenant, ApiKeyCreate(name=role, role=role)).secret
            for role in (Role.ADMIN, Role.CLIENT)
        }
        self.api_key = keys[Role.CLIENT]
        self.admin = KeyService(self.keysvc_url, keys[Role.ADMIN])
        record = {
            "id": self.model,
            "base": "/models/base",
            "vocab_size": self.tokenizer.size,
            "context_length": 4096,
            "tokenizer_digest": self.tokenizer.digest,
            "chat_template_digest": self.tokenizer.chat_template_digest,
        }
        self.admin.create_model(self.tenant, ModelCreate.model_validate(record | changes))

    def rotate(self, **options: Any) -> KeyVersionRead:
        """Issue a version, serve it and make it ACTIVE; ``options`` are the engine's."""
        version = self.platform.rotate(self.tenant, self.model).version
        grant = self.platform.materialize(self.tenant, self.model, version).secret
        record = self.platform.get_version(self.tenant, self.model, version)
        with KeyService(self.keysvc_url, grant) as job:
            root = job.release(self.tenant, self.model, version, "materialize").material()
            job.stage(self.tenant, self.model, version, MATERIALIZED)
        key = TenantKey.from_root(root, self.tenant, self.model, version)
        self.serve(record, self._make_engine(key, **options))
        endpoint = self._cluster.url + route_prefix(self.tenant, self.model, version)
        return self.platform.activate(self.tenant, self.model, version, Activation(endpoint=endpoint))

    def serve(self, version: KeyVersionRead, engine: Any) -> None:
        settings = EngineSettings(
            tenant=self.tenant,
            model=self.model,
            version=version.version,
            replica="file:///nowhere",
            key_id=version.key_id,
            context_length=4096,
        )
        self.engines.add(settings, engine)
        self.tell(version.version, "serving")

    def endpoint(self, version: int) -> Endpoint:
        """The engine's side of one version."""
        return self.engines.endpoints[route_prefix(self.tenant, self.model, version)]

    def tell(self, version: int, status: Any) -> None:
        """Push a key state, as the operator does."""
        self.endpoint(version).reconfigure(KeyState(status=status, jwks=self.platform.inference_keys().keys))

    def releases(self) -> int:
        """How often a client has been given a key."""
        rows = everything(self.admin.audit, self.tenant)
        return sum(row.action == "release" and row.detail.get("purpose") == "client" for row in rows)

    def stop_keysvc(self) -> None:
        """From now on nobody answers there."""
        self._keysvc.__exit__()

    def running(self, version: int) -> int:
        """Sequences that the engine of a version is computing."""
        return self.endpoint(version).engine.load().running

    wait_until = staticmethod(wait_until)


class Faulty(FakeEngine):
    """The fake engine with a fault that a test can bring about."""

    fails = False

    async def submit(self, prompt: Any, sampling: Any) -> AsyncGenerator[Any]:
        async with aclosing(super().submit(prompt, sampling)) as tokens:
            async for token in tokens:
                if self.fails:
                    raise Unavailable("the engine failed", code="unavailable")
                yield token


def faulty(key: TenantKey, **options: Any) -> Faulty:
    """A fake engine over the small tokenizer's vocabulary."""
    return Faulty(key.id, vocab_size=400, **options)


def real_engine(key: TenantKey, *, base: Path, out: Path) -> Any:
    """SmolLM2, encrypted under ``key`` and loaded as any replica is."""
    from anamorph.pipeline import fold
    from anamorph.serve.engines.torch import Capacity, load

    fold(base, out, key, "permute")
    return load(out, "float32", Capacity(context_length=4096))


MATERIALIZED = Materialized(
    replica="file:///nowhere", manifest_sha256="0" * 64, probe=Probe(prompts=((1,),), expected=((1,),))
)


def keysvc_home_in(folder: Path) -> Path:
    """An initialised home of a key service."""
    before = os.umask(0o077)
    try:
        home = Home(folder / "keysvc")
        keysvc_home.init(home, lambda: datetime.now(UTC), os.urandom)
    finally:
        os.umask(before)
    return home.path


@contextmanager
def running_stack(
    folder: Path, tokenizer: Tokenizer, make_engine: Callable[..., Any] = faulty, **options: Any
) -> Iterator[Stack]:
    """Key service and cluster with one ACTIVE version."""
    with Stack(keysvc_home_in(folder), tokenizer, make_engine) as running:
        running.register()
        running.rotate(**options)
        yield running
        running.admin.close()
