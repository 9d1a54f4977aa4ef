"""The command line in a process of its own, as users run it, and the key service it talks to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from anamorph.wire.admin import ApiKeyCreate, KeyVersionRead, ModelCreate, Role, TenantCreate
from anamorph.wire.keyservice import KeyService, everything

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def anamorph() -> Run:
    """Run ``python -m anamorph.cli`` with these arguments; give back exit code and both outputs."""

    def run(*args: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "anamorph.cli", *map(str, args)],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"NO_COLOR": "1", "COLUMNS": "120", "OMP_NUM_THREADS": "1"},
        )

    return run


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama checkpoint."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.4,
    )
    folder = tmp_path_factory.mktemp("bases") / "base"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Service:
    """A running key service."""

    url: str
    platform: str


@contextmanager
def started(home: Path, **environment: str) -> Iterator[Service]:
    """The real key service in a process of its own, on a free port."""
    command = [sys.executable, "-m", "anamorph_keysvc.main"]
    subprocess.run([*command, "init", "--home", str(home)], check=True, capture_output=True)
    port_file = home / "port"
    serve = [*command, "serve", "--home", str(home), "--port", "0", "--port-file", str(port_file)]
    process = subprocess.Popen(
        serve, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            if port_file.exists():
                break
            assert process.poll() is None, "the key service ended"
            time.sleep(0.1)
        url = f"http://127.0.0.1:{port_file.read_text().strip()}"
        yield Service(url, (home / "platform-admin.key").read_text().strip())
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One key service for all tests that do not ask for settings of their own."""
    with started(tmp_path_factory.mktemp("keysvc") / "home") as running:
        yield running


class Materializing:
    """A version in MATERIALIZING, and the order that an operator would write for it."""

    def __init__(self, service: Service, base: Path, folder: Path) -> None:
        self._service = service
        self._base = base
        self.store, self.scratch = folder / "store", folder / "scratch"
        self.tenant = f"t{uuid.uuid4().hex[:12]}"
        self.keys = KeyService(service.url, service.platform)
        self.keys.create_tenant(TenantCreate(id=self.tenant))
        admin = self.keys.create_api_key(self.tenant, ApiKeyCreate(name="admin", role=Role.ADMIN))
        model = ModelCreate(id="chat", base=str(base), vocab_size=64, context_length=64)
        self.admin = KeyService(service.url, admin.secret)
        self.admin.create_model(self.tenant, model)
        self.admin.rotate(self.tenant, "chat")

    def audit(self) -> list[str]:
        """What the key service has written down about the tenant."""
        return [row.action for row in everything(self.admin.audit, self.tenant)]

    def close(self) -> None:
        """Close the connections."""
        self.keys.close()
        self.admin.close()

    def order(self, **changes: Any) -> dict[str, Any]:
        """An order with a fresh grant."""
        return {
            "keysvc": self._service.url,
            "tenant": self.tenant,
            "model": "chat",
            "version": 1,
            "grant": self.keys.materialize(self.tenant, "chat", 1).secret,
            "store": str(self.store),
            "scratch": str(self.scratch),
            "base": str(self._base),
            "profile": "rotate",
            "dtype": "float32",
            "allow_base": [str(self._base.parent)],
        } | changes

    def pod(self, **changes: Any) -> tuple[str, Path, str, Path]:
        """Options of a job that asks for its own grant: its task, and the credential of a materialiser."""
        folder = self.scratch.parent
        task, token = folder / "task.json", folder / "token"
        order = self.order(**changes)
        task.write_text(json.dumps({name: value for name, value in order.items() if name != "grant"}))
        token.write_text(self.credential() + "\n")
        return "--task", task, "--token-file", token

    def credential(self, role: Role = Role.MATERIALIZER) -> str:
        """A new API key."""
        return self.keys.create_api_key(self.tenant, ApiKeyCreate(name="pods", role=role)).secret

    @property
    def version(self) -> KeyVersionRead:
        return self.keys.get_version(self.tenant, "chat", 1)


@pytest.fixture
def materializing(service: Service, base: Path, tmp_path: Path) -> Iterator[Materializing]:
    made = Materializing(service, base, tmp_path)
    yield made
    made.close()


class Shell:
    """A tenant of its own, and the command line as its administrator uses it."""

    def __init__(self, run: Run, service: Service, folder: Path) -> None:
        self._run = run
        self.url = service.url
        self.tenant = f"t{uuid.uuid4().hex[:12]}"
        self.platform_key, self.admin_key = folder / "platform.key", folder / "admin.key"
        self.platform = KeyService(service.url, service.platform)
        self.platform.create_tenant(TenantCreate(id=self.tenant))
        secret = self.platform.create_api_key(self.tenant, ApiKeyCreate(name="a", role=Role.ADMIN)).secret
        for path, key in ((self.platform_key, service.platform), (self.admin_key, secret)):
            path.touch(0o600)
            path.write_text(f"{key}\n")
        self.admin = KeyService(service.url, secret)

    def __call__(
        self, *args: object, key: Path | None = None, code: int = 0, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a command with the connection's options, by default with the tenant's admin key."""
        connection = ("--keysvc", self.url, "--api-key-file", key or self.admin_key)
        done = self._run(*args, *connection, stdin=stdin)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    def json(self, *args: object, key: Path | None = None) -> Any:
        """What a command prints for programs."""
        return json.loads(self(*args, "--json", key=key).stdout)

    def model(self) -> None:
        """Register a model called chat."""
        body = ModelCreate(id="chat", base="/base", vocab_size=64, context_length=64)
        self.admin.create_model(self.tenant, body)

    def close(self) -> None:
        """Close the connections."""
        self.platform.close()
        self.admin.close()


@pytest.fixture
def shell(anamorph: Run, service: Service, tmp_path: Path) -> Iterator[Shell]:
    made = Shell(anamorph, service, tmp_path)
    yield made
    made.close()
