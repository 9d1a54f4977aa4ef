"""Fixtures of the tenant's side: a small real tokenizer, and a key."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from anamorph.cli.smollm2 import FOLDER, default_cache
from anamorph.client import Client
from anamorph.client.tokenizer import Tokenizer
from anamorph.errors import NotFound, Unavailable
from anamorph.keys import TenantKey
from anamorph.serve.answers import refusal
from anamorph.serve.endpoint import Endpoint
from anamorph.serve.engines.fake import FakeEngine
from anamorph.serve.openai_api import build_app
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
from anamorph_keysvc import home as keysvc_home
from anamorph_keysvc.app import build_app as build_keysvc
from anamorph_keysvc.home import Home

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = [
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "Ein schöner Tag über den Dächern von Köln.",
    "你好，世界。今天天气很好。",
    "Emoji such as 👋🌍 and 👩‍👩‍👧 are several bytes each.",
    "def add(a, b):\n    return a + b\n",
]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 400 ids with a chat template, as a Hugging Face folder."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(SENTENCES * 3, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[1],
        "eos_token": SPECIALS[2],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    """The small tokenizer, loaded."""
    return Tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    """SmolLM2's own tokenizer, where its folder has been made on this machine."""
    folder = default_cache() / FOLDER
    if not folder.is_dir():
        pytest.skip("SmolLM2 is not on this machine; `make demo` fetches it")
    return Tokenizer(folder)


@pytest.fixture
def key() -> TenantKey:
    """A key of known bytes."""
    return TenantKey.from_root(bytes(range(32)), "acme", "chat", 1)


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

    def add(self, settings: EngineSettings, engine: Any) -> Endpoint:
        prefix = route_prefix(settings.tenant, settings.model, settings.version)
        telemetry = build("anamorph-engine-test")
        endpoint = Endpoint(settings, engine, telemetry)
        self.endpoints[prefix], self.apps[prefix] = endpoint, build_app(endpoint)
        return endpoint

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        for prefix, app in self.apps.items():
            if scope["path"].startswith(prefix + "/"):
                await app({**scope, "root_path": prefix}, receive, send)
                return
        await refusal(NotFound("there is nothing here", code="not_found"))(scope, receive, send)


class Stack:
    """A key service and engines on real sockets; the operator's part is played by ``rotate``."""

    tenant, model = "acme", "chat"

    def __init__(self, home: Path, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
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
        """Issue a version, serve it on a fake engine and make it ACTIVE."""
        version = self.platform.rotate(self.tenant, self.model).version
        grant = self.platform.materialize(self.tenant, self.model, version).secret
        record = self.platform.get_version(self.tenant, self.model, version)
        with KeyService(self.keysvc_url, grant) as job:
            job.release(self.tenant, self.model, version, "materialize")
            job.stage(self.tenant, self.model, version, MATERIALIZED)
        self.serve(record, Faulty(record.key_id, vocab_size=self.tokenizer.size, **options))
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


MATERIALIZED = Materialized(
    replica="file:///nowhere", manifest_sha256="0" * 64, probe=Probe(prompts=((1,),), expected=((1,),))
)


@pytest.fixture
def keysvc_dir(tmp_path: Path) -> Path:
    """An initialised home of a key service."""
    before = os.umask(0o077)
    try:
        home = Home(tmp_path / "keysvc")
        keysvc_home.init(home, lambda: datetime.now(UTC), os.urandom)
    finally:
        os.umask(before)
    return home.path


@pytest.fixture
def stack(keysvc_dir: Path, tokenizer: Tokenizer) -> Iterator[Stack]:
    """Key service and cluster with one ACTIVE version on the fake engine."""
    with Stack(keysvc_dir, tokenizer) as running:
        running.register()
        running.rotate()
        yield running
        running.admin.close()


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    """A client of the stack."""
    with Client(stack.keysvc_url, stack.api_key, stack.tenant, stack.model) as made:
        yield made
