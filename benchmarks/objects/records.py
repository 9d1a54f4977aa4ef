"""What the key service and the store hold of each object before the operator comes: an active version."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from tests.keysvc.conftest import Clock, World
from tests.operator.kubernetes.objects import encrypted_model, held
from tests.system import quick_materializer

from anamorph import telemetry
from anamorph.keys import TenantKey
from anamorph.wire.admin import Activation, ModelCreate, TenantCreate
from anamorph.wire.serving import route_prefix
from anamorph_keysvc.database import Database
from anamorph_keysvc.homes import Home, init
from anamorph_keysvc.service import lifecycle, materialization, tenants
from anamorph_keysvc.service.work import Service, utc_now
from anamorph_keysvc.settings import Limits
from anamorph_keysvc.wrapper import LocalWrapper
from anamorph_operator.kubernetes import records
from anamorph_operator.kubernetes.resources.objects import EncryptedModel

VOCAB = 1000
MODEL = "chat"
Message = MutableMapping[str, Any]


def tenant(number: int) -> str:
    """Name of the n-th object's tenant, and of its namespace."""
    return f"t{number:05d}"


def body(number: int, cluster: str) -> dict[str, Any]:
    """The n-th object."""
    return encrypted_model(MODEL, tenant=tenant(number), servingCluster=cluster, vocabSize=VOCAB)


def opened(folder: Path) -> World:
    """A key service on SQLite with everything of its own, on the real clock."""
    home = Home(folder / "home")
    init(home, utc_now, os.urandom)
    database = Database.sqlite(home.database)
    service = Service(database, LocalWrapper.load(home.wrapping_key), Limits(), utc_now, os.urandom)
    return World(home, service, Clock(), telemetry.build("bench"), database.engine)


def publish(world: World, folder: Path, number: int, cluster: str, url: str) -> None:
    """Register the n-th object's model as the operator would, and bring one version into service.

    Args:
        world: the key service.
        folder: with the store and the scratch folder.
        number: of the object.
        cluster: that it lies on.
        url: where clients reach the cluster.
    """
    at = (tenant(number), MODEL)
    resource = EncryptedModel.read(held(body(number, cluster)))
    world.do(tenants.create_tenant, TenantCreate(id=at[0]))
    world.do(tenants.create_model, at[0], ModelCreate.model_validate(records.creation(resource)))
    version = (*at, world.rotate(*at))
    grant = world.grant(version[2], *at)
    holder = world.holder(grant)
    key = TenantKey.from_root(world.release_to_job(holder, *version).material(), *version)
    order = {"store": str(folder / "store"), "scratch": str(folder / "scratch"), "grant": grant}
    made = quick_materializer.publish(order, key, {"model_type": "fake", "vocab_size": VOCAB})
    world.do(materialization.stage, holder, *version, made)
    served = Activation(endpoint=url + route_prefix(*version))
    world.do(lifecycle.activate, *version, None, served)


class Counted:
    """An ASGI application that notes when it was asked for what, names of tenants and models left out."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self.calls: list[tuple[float, str]] = []

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        """As any ASGI application."""
        if scope["type"] == "http":
            query = scope["query_string"].decode("ascii")
            self.calls.append((time.time(), f"{scope['method']} {_kind(scope['path'], query)}"))
        await self._app(scope, receive, send)


def _kind(path: str, query: str) -> str:
    path = re.sub(r"/(tenants|models)/[^/]+", r"/\1/*", path)
    due = " due" if "due=true" in query else ""
    return path + due


def dumped(value: Any) -> str:
    """JSON as people read it."""
    return json.dumps(value, indent=2)
