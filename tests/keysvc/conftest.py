"""A key service on each kind of database, with a clock that stands still and chosen randomness."""

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
from sqlalchemy import Engine
from tests.keysvc import databases
from tests.keysvc.databases import Databases, EmptiedPostgres, SqliteFiles
from tests.servers.postgres import SUPERUSER, PostgresServer

from anamorph import telemetry
from anamorph.wire.admin import (
    Activation,
    ApiKeyCreate,
    Materialized,
    ModelCreate,
    Probe,
    ReleaseRead,
    Role,
    RotationPolicy,
    TenantCreate,
)
from anamorph.wire.keyservice import AsyncKeyService
from anamorph_keysvc.app import build_app
from anamorph_keysvc.credentials import Caller, GrantHolder, holder
from anamorph_keysvc.homes import Home, init, register_platform_key
from anamorph_keysvc.scope import PLATFORM
from anamorph_keysvc.service import (
    lifecycle,
    lookup,
    materialization,
    preparation,
    release,
    rotation,
    tenants,
    tokens,
)
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
    jitter=0,
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
    admin: Engine
    app: FastAPI = field(init=False)
    keys: dict[tuple[str, Role], str] = field(default_factory=dict)
    artifact: Materialized = ARTIFACT
    policy: RotationPolicy = POLICY

    def __post_init__(self) -> None:
        self.app = build_app(self.service, self.measured)

    def do(self, act: Callable[Concatenate[Work, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        with self.service.work("test", PLATFORM) as work:
            return act(work, *args, **kwargs)

    def sql(self, statement: str, *values: object) -> list[Any]:
        """Run a statement past the service, as one whom no missing right stops; ``?`` stands for a value."""
        return databases.sql(self.admin, statement, *values)

    @property
    def dialect(self) -> str:
        return self.service.database.dialect

    def kek(self, tenant: str = "acme") -> str:
        with self.service.database.read(PLATFORM) as session:
            return lookup.tenant(session, tenant).kek

    def inference_token(self, tenant: str, model: str) -> str:
        caller = Caller("key:x", Role.CLIENT, tenant)
        return tokens.issue(self.service, caller, tenant, model, caller.actor).token

    def release_to_client(self, tenant: str, model: str, version: int) -> ReleaseRead:
        return release.to_client(self.service, Caller("test", Role.CLIENT, tenant), (tenant, model, version))

    def release_to_job(
        self, holder: GrantHolder, tenant: str, model: str, version: int, part: int | None = None
    ) -> ReleaseRead:
        return release.to_job(self.service, holder, (tenant, model, version), part)

    def model(self, tenant: str = "acme", model: str = "chat", **policy: Any) -> None:
        with self.service.database.read(PLATFORM) as session:
            known = session.get(Tenant, tenant) is not None
        if not known:
            self.do(tenants.create_tenant, TenantCreate(id=tenant))
        chosen = RotationPolicy.model_validate(self.policy.model_dump() | policy)
        body = ModelCreate(id=model, base="file:///base", vocab_size=50, context_length=64, policy=chosen)
        self.do(tenants.create_model, tenant, body)

    def holder(self, secret: str) -> GrantHolder:
        grant = holder(self.service.database, secret).grant
        assert grant is not None
        return grant

    def rotate(self, tenant: str = "acme", model: str = "chat") -> int:
        operation = self.do(rotation.rotate, tenant, model)
        preparation.prepare(self.service, operation.id)
        return operation.version

    def grant(self, version: int, tenant: str = "acme", model: str = "chat") -> str:
        return self.do(materialization.materialize, tenant, model, version, None).secret

    def staged(self, tenant: str = "acme", model: str = "chat") -> int:
        at = (tenant, model, self.rotate(tenant, model))
        holder = self.holder(self.grant(at[2], tenant, model))
        self.release_to_job(holder, *at)
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


@pytest.fixture(scope="session")
def migrated(postgres_server: PostgresServer) -> str:
    """The name of an empty PostgreSQL database with roles and schema, to be cloned."""
    name = "keysvc_template"
    postgres_server.create_database(name)
    databases.set_up(postgres_server, name)
    return name


@pytest.fixture(scope="session")
def emptied(postgres_server: PostgresServer, migrated: str) -> Iterator[EmptiedPostgres]:
    with (
        postgres_server.fresh(migrated) as name,
        databases.engine_of(postgres_server, name, SUPERUSER) as admin,
    ):
        databases.set_up_roles(postgres_server, name)  # a clone has no rights to the database itself
        yield EmptiedPostgres(postgres_server, name, admin)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.real)])
def database(request: pytest.FixtureRequest) -> str:
    """Which database the test runs on: both, unless it says otherwise by ``parametrize``."""
    name: str = request.param
    return name


@pytest.fixture
def opener(database: str, request: pytest.FixtureRequest) -> Databases:
    """What opens the databases of this test."""
    if database == "sqlite":
        return SqliteFiles()
    shared: EmptiedPostgres = request.getfixturevalue("emptied")
    return shared


def open_world(opener: Databases, home: Home, entropy: Callable[[int], bytes] = os.urandom) -> World:
    clock = Clock()
    database, admin = opener.open(home)
    # A busy machine takes its time: what a deadline does is tested where there is something to wait for.
    limits = Limits(request_deadline_s=60)
    service = Service(database, LocalWrapper.load(home.wrapping_key), limits, clock, entropy)
    if database.dialect == "postgresql":  # a home's own file has them from ``init``
        register_platform_key(service, home.platform_key)
        tokens.ensure_signing_key(service)
    return World(home, service, clock, telemetry.build("keysvc-test"), admin)


def close_world(world: World) -> None:
    world.service.database.close()
    world.measured.shutdown()


@pytest.fixture
def home(template: Home, tmp_path: Path) -> Home:
    return Home(Path(shutil.copytree(template.path, tmp_path / "home")))


@pytest.fixture
def open_homes(opener: Databases) -> Iterator[Callable[..., World]]:
    """Opens worlds, several over one home if need be, and closes them after the test."""
    opened: list[World] = []

    def opening(home: Home, entropy: Callable[[int], bytes] = os.urandom) -> World:
        opened.append(open_world(opener, home, entropy))
        return opened[-1]

    yield opening
    for world in opened:
        close_world(world)


@pytest.fixture
def world(home: Home, open_homes: Callable[..., World]) -> World:
    return open_homes(home)
