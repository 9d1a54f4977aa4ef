"""A key service on a temporary SQLite file, with a clock that stands still and chosen randomness."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import httpx
import pytest
from fastapi import FastAPI

from anamorph import telemetry
from anamorph.wire.admin import (
    Activation,
    ApiKeyCreate,
    Materialized,
    ModelCreate,
    Probe,
    Role,
    RotationPolicy,
    TenantCreate,
)
from anamorph.wire.keyservice import AsyncKeyService
from anamorph_keysvc.app import build_app
from anamorph_keysvc.credentials import GrantHolder, authenticate
from anamorph_keysvc.database import Database
from anamorph_keysvc.home import Home, init
from anamorph_keysvc.service import lifecycle, materialization, release, rotation, tenants
from anamorph_keysvc.service.work import Service, Work
from anamorph_keysvc.settings import Limits
from anamorph_keysvc.tables import Tenant
from anamorph_keysvc.wrapper import LocalWrapper

P = ParamSpec("P")
R = TypeVar("R")

START = datetime(2030, 1, 1, tzinfo=UTC)
ARTIFACT = Materialized(
    replica="file:///replica", manifest_sha256="0" * 64, probe=Probe(prompts=((1, 2),), expected=((3,),))
)
POLICY = RotationPolicy(
    grace_s=60,
    client_cache_ttl_s=10,
    longest_request_s=10,
    clock_skew_s=1,
    propagation_s=1,
    destroy_delay_s=100,
)


@dataclass
class Clock:
    now: datetime = START

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@dataclass
class World:
    """A service and what tests do with it; ``secret`` makes and remembers an API key per tenant and role."""

    home: Home
    service: Service
    clock: Clock
    measured: telemetry.Telemetry
    app: FastAPI = field(init=False)
    keys: dict[tuple[str, Role], str] = field(default_factory=dict)
    artifact: Materialized = ARTIFACT
    policy: RotationPolicy = POLICY

    def __post_init__(self) -> None:
        self.app = build_app(self.service, self.measured)

    def do(self, act: Callable[Concatenate[Work, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        with self.service.work("test") as work:
            return act(work, *args, **kwargs)

    def model(self, tenant: str = "acme", model: str = "chat", **policy: Any) -> None:
        with self.service.database.read() as session:
            known = session.get(Tenant, tenant) is not None
        if not known:
            self.do(tenants.create_tenant, TenantCreate(id=tenant))
        chosen = RotationPolicy.model_validate(self.policy.model_dump() | policy)
        body = ModelCreate(id=model, base="file:///base", vocab_size=50, context_length=64, policy=chosen)
        self.do(tenants.create_model, tenant, body)

    def holder(self, secret: str) -> GrantHolder:
        with self.service.database.read() as session:
            grant = authenticate(session, f"Bearer {secret}").grant
        assert grant is not None
        return grant

    def rotate(self, tenant: str = "acme", model: str = "chat") -> int:
        return self.do(rotation.rotate, tenant, model).version

    def grant(self, version: int, tenant: str = "acme", model: str = "chat") -> str:
        return self.do(materialization.materialize, tenant, model, version, None).secret

    def staged(self, tenant: str = "acme", model: str = "chat") -> int:
        at = (tenant, model, self.rotate(tenant, model))
        holder = self.holder(self.grant(at[2], tenant, model))
        self.do(release.to_job, holder, *at)
        self.do(materialization.stage, holder, *at, self.artifact)
        return at[2]

    def active(self, tenant: str = "acme", model: str = "chat") -> int:
        version = self.staged(tenant, model)
        self.do(lifecycle.activate, tenant, model, version, None, Activation(endpoint="http://engine"))
        return version

    def secret(self, role: Role, tenant: str = "acme") -> str:
        if role is Role.PLATFORM:
            return self.home.platform_key.read_text()
        if (tenant, role) not in self.keys:
            made = self.do(tenants.create_api_key, tenant, ApiKeyCreate(name="test", role=role))
            self.keys[tenant, role] = made.secret
        return self.keys[tenant, role]

    def http(self, token: str | None = None) -> httpx.AsyncClient:
        """A bare client, to see answers as they are; errors of the app become 500, as on the network."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.AsyncClient(transport=self.transport(), base_url="http://keysvc", headers=headers)

    def client(self, role: Role, tenant: str = "acme") -> AsyncKeyService:
        return self.bearing(self.secret(role, tenant))

    def bearing(self, token: str) -> AsyncKeyService:
        return AsyncKeyService("http://keysvc", token, transport=self.transport())

    def transport(self) -> httpx.ASGITransport:
        return httpx.ASGITransport(self.app, raise_app_exceptions=False)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """An initialised home, made once and copied by each test."""
    home = Home(tmp_path_factory.mktemp("template") / "home")
    init(home, Clock(), os.urandom)
    return home


def open_world(home: Home, entropy: Callable[[int], bytes] = os.urandom) -> World:
    clock = Clock()
    service = Service(
        Database.sqlite(home.database), LocalWrapper.load(home.wrapping_key), Limits(), clock, entropy
    )
    return World(home, service, clock, telemetry.build("keysvc-test"))


def close_world(world: World) -> None:
    world.service.database.close()
    world.measured.shutdown()


@pytest.fixture
def home(template: Home, tmp_path: Path) -> Home:
    return Home(Path(shutil.copytree(template.path, tmp_path / "home")))


@pytest.fixture
def open_homes() -> Iterator[Callable[..., World]]:
    """Opens worlds, several over one home if need be, and closes them after the test."""
    opened: list[World] = []

    def opening(home: Home, entropy: Callable[[int], bytes] = os.urandom) -> World:
        opened.append(open_world(home, entropy))
        return opened[-1]

    yield opening
    for world in opened:
        close_world(world)


@pytest.fixture
def world(home: Home, open_homes: Callable[..., World]) -> World:
    return open_homes(home)
