"""Every process that tells something of itself, before one real collector and one real Prometheus.

Key service, Ray with the door, an engine of its own and one behind the door, a pool, the plaintext
baseline, and the continuous canary; the operator's part is played here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tests.servers.otelcol import Collector, running_otelcol
from tests.servers.process import PATIENCE_S, Program, free_port
from tests.servers.prometheus import Prometheus, running_prometheus

from anamorph.serve.cluster.local import RayProcess, start_ray, stop_ray
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
from anamorph.wire.keyservice import KeyService
from anamorph.wire.serving import (
    APP_IMPORT_PATH,
    DOOR_IMPORT_PATH,
    POOL_IMPORT_PATH,
    app_name,
    pool_name,
    route_prefix,
)

TENANT, MODEL, SLEEPER, MEMBER, POOL = "acme", "chat", "sleeper", "member", "small"
# What the models' records say; the first has a replica of its own that stays.
SERVING: dict[str, dict[str, Any]] = {
    MODEL: {},
    SLEEPER: {"autoscaling": {"min_replicas": 0, "max_replicas": 1}},
    MEMBER: {"placement": "shared", "pool": POOL},
}
VOCAB = 1_000_000
# Exporters wait five seconds and a minute otherwise.
QUICK = {"OTEL_BSP_SCHEDULE_DELAY": "200", "OTEL_METRIC_EXPORT_INTERVAL": "500"}
ENCRYPTED, PLAINTEXT = "fake:?vocab_size=1000000&delay_ms=8", {"vocab_size": VOCAB, "delay_ms": 4}
MATERIALIZED = Materialized(
    replica=ENCRYPTED, manifest_sha256="0" * 64, probe=Probe(prompts=((1,),), expected=((1,),))
)


@dataclass
class System:
    """All of it, running."""

    folder: Path
    collector: Collector
    prometheus: Prometheus
    ray: RayProcess
    keysvc: Program
    keysvc_url: str
    platform: KeyService
    api_key: str = field(default="", repr=False)
    canary: Program | None = None

    @property
    def platform_key(self) -> Path:
        return self.folder / "keysvc" / "platform-admin.key"

    def model(self, name: str, **record: Any) -> KeyVersionRead:
        """Register a model and bring its first version up to STAGED."""
        fields = {"id": name, "base": "/models/base", "vocab_size": VOCAB, "context_length": 4096}
        with KeyService(self.keysvc_url, self.admin) as admin:
            admin.create_model(TENANT, ModelCreate.model_validate(fields | record))
        version = self.platform.rotate(TENANT, name).version
        grant = self.platform.materialize(TENANT, name, version).secret
        with KeyService(self.keysvc_url, grant) as job:
            job.release(TENANT, name, version, "materialize")
            job.stage(TENANT, name, version, MATERIALIZED)
        return self.platform.get_version(TENANT, name, version)

    def activate(self, version: KeyVersionRead) -> None:
        endpoint = self.ray.serve_url + route_prefix(TENANT, version.model, version.version)
        self.platform.activate(TENANT, version.model, version.version, Activation(endpoint=endpoint))

    admin: str = field(default="", repr=False)

    def tenant(self) -> None:
        self.platform.create_tenant(TenantCreate(id=TENANT))
        made = {
            role: self.platform.create_api_key(TENANT, ApiKeyCreate(name=role, role=role)).secret
            for role in (Role.ADMIN, Role.CLIENT)
        }
        self.admin, self.api_key = made[Role.ADMIN], made[Role.CLIENT]

    def deploy(self, versions: list[KeyVersionRead]) -> None:
        """Write all applications as the operator does, and wait until they run."""
        jwks = [key.model_dump() for key in self.platform.inference_keys().keys]
        served = [self._pool(v, jwks) if v.model == MEMBER else self._app(v, jwks) for v in versions]
        apps = [self._door(versions, jwks), self._baseline(jwks), *served]
        body = {
            "proxy_location": "HeadOnly",
            "http_options": self.ray.http_options(),
            "applications": apps,
        }
        api = f"{self.ray.dashboard_url}/api/serve/applications/"
        headers = self.ray.headers()
        with httpx.Client(timeout=60, headers=headers, trust_env=False) as http:
            answer = http.put(api, json=body)
            assert answer.is_success, answer.text
            self.collector.wait(lambda _: _running(http.get(api).json()["applications"]))

    def _door(self, versions: list[KeyVersionRead], jwks: list[Any]) -> dict[str, Any]:
        routes = [
            {
                "tenant": TENANT,
                "model": one.model,
                "version": one.version,
                "key_id": one.key_id,
                "status": "serving",
                "app": _behind_the_door(one),
            }
            for one in versions
        ]
        state = {"jwks": jwks, "routes": routes, "otlp_endpoint": self.collector.url}
        return {
            "name": "door",
            "route_prefix": "/",
            "import_path": DOOR_IMPORT_PATH,
            "args": {},
            "deployments": [{"name": "door", "user_config": state}],
        }

    def _app(self, one: KeyVersionRead, jwks: list[Any]) -> dict[str, Any]:
        route = None if _behind_the_door(one) else route_prefix(TENANT, one.model, one.version)
        args = {"tenant": TENANT, "model": one.model, "version": one.version, "key_id": one.key_id}
        return self._engine(args | {"replica": ENCRYPTED}, route, jwks)

    def _pool(self, one: KeyVersionRead, jwks: list[Any]) -> dict[str, Any]:
        member = one.model_dump(mode="json", include={"tenant", "model", "version", "key_id", "public_key"})
        member |= {"replica": ENCRYPTED, "manifest_sha256": "0" * 64}
        size = {"engine": "fake", "context_length": 4096}
        return {
            "name": pool_name(POOL),
            "route_prefix": None,
            "import_path": POOL_IMPORT_PATH,
            "args": size | {"pool": POOL, "otlp_endpoint": self.collector.url},
            "deployments": [{"name": "pool", "user_config": {"jwks": jwks, "members": [member]}}],
        }

    def _baseline(self, jwks: list[Any]) -> dict[str, Any]:
        """From a folder, so that there is something to load."""
        base = self.folder / "plaintext"
        base.mkdir()
        (base / "config.json").write_text(json.dumps(PLAINTEXT))
        args = {"tenant": "plaintext", "model": MODEL, "version": 0, "protection": "plaintext"}
        return self._engine(args | {"replica": str(base)}, route_prefix("plaintext", MODEL, 0), jwks)

    def _engine(self, args: dict[str, Any], route: str | None, jwks: list[Any]) -> dict[str, Any]:
        fixed = {"engine": "fake", "context_length": 4096, "otlp_endpoint": self.collector.url}
        return {
            "name": app_name(args["tenant"], args["model"], args["version"]),
            "route_prefix": route,
            "import_path": APP_IMPORT_PATH,
            "args": fixed | args,
            "deployments": [{"name": "engine", "user_config": {"jwks": jwks}}],
        }


def _behind_the_door(one: KeyVersionRead) -> str | None:
    """The application that the door forwards to; none for a version with a route of its own."""
    own = app_name(TENANT, one.model, one.version)
    return {MODEL: None, SLEEPER: own, MEMBER: pool_name(POOL)}[one.model]


def _running(apps: dict[str, Any]) -> bool:
    failed = {name: app["message"] for name, app in apps.items() if app["status"] == "DEPLOY_FAILED"}
    assert not failed, failed
    return bool(apps) and all(app["status"] == "RUNNING" for app in apps.values())


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")} | QUICK


@contextmanager
def running_system(folder: Path, rules: list[Path]) -> Iterator[System]:
    """The system with traffic from its canary; nothing of it stays behind."""
    with ExitStack() as stays:
        collector = stays.enter_context(running_otelcol(folder))
        target = collector.page.removeprefix("http://").removesuffix("/metrics")
        prometheus = stays.enter_context(running_prometheus(folder, target, rules))
        ray = start_ray(folder / "ray", num_cpus=8, env=QUICK)
        stays.callback(stop_ray, ray)
        keysvc, url = _keysvc(folder, collector)
        stays.callback(keysvc.stop)
        key = (folder / "keysvc" / "platform-admin.key").read_text().strip()
        platform = stays.enter_context(KeyService(url, key))
        system = System(folder, collector, prometheus, ray, keysvc, url, platform)
        system.tenant()
        versions = [system.model(name, serving=serving) for name, serving in SERVING.items()]
        system.deploy(versions)
        for version in versions:
            system.activate(version)
        system.canary = _canary(system)
        stays.callback(system.canary.stop)
        yield system


def _keysvc(folder: Path, collector: Collector) -> tuple[Program, str]:
    home, port = folder / "keysvc", free_port()
    command = [sys.executable, "-m", "anamorph_keysvc.main"]
    subprocess.run([*command, "init", "--home", str(home)], check=True, capture_output=True, timeout=120)
    url = f"http://127.0.0.1:{port}"
    serve = ["serve", "--home", str(home), "--port", str(port), f"--otlp-endpoint={collector.url}"]
    program = Program([*command, *serve], folder / "keysvc.log", environment())
    program.start(lambda: _alive(url))
    return program, url


def _alive(url: str) -> bool:
    try:
        return httpx.get(f"{url}/livez", trust_env=False, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _canary(system: System) -> Program:
    options = {
        "keysvc": system.keysvc_url,
        "key-file": system.platform_key,
        "serve-url": system.ray.serve_url,
        "every": 0.02,
        "length": 8,
        "output-tokens": 6,
        "otlp-endpoint": system.collector.url,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "anamorph.cli", "canary", "watch", *flags]
    program = Program(command, system.folder / "canary.log", environment())
    program.start(lambda: "anamorph_overhead_ratio" in system.collector.metrics())
    return program


__all__ = ["MEMBER", "MODEL", "PATIENCE_S", "SLEEPER", "TENANT", "VOCAB", "System", "running_system"]
