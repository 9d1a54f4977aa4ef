"""Ids that would climb out of their place: refused at the door, before Vault is asked for anything."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from tests.servers.asgi import serving
from tests.servers.proxies import StatusProxy

from anamorph.wire.admin import Role
from anamorph_keysvc.app import build_app
from anamorph_keysvc.roots import RootCache
from anamorph_keysvc.vault.wrapper import VaultTransitWrapper

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send
    from tests.keysvc.conftest import World
    from tests.keysvc.vault.conftest import Place

pytestmark = pytest.mark.real
# Ids as they stand in a path: what climbs, what hides a slash, what Vault's policies would expand.
HOSTILE = (
    "..",
    "../decrypt/other",
    "%2e%2e",
    "%2e%2e%2fdecrypt%2fother",
    "a%2fb",
    "*",
    "+",
    "keys%2f+",
    "\u00e4",
    "%c3%a4",
    "%c3%a4%00",
    "a b",
    "a%20b",
    "-a",
    "x" * 10_000,
)
# As they stand in a body.
IN_BODIES = (
    "..",
    "../decrypt/other",
    "a/b",
    "%2e%2e",
    "*",
    "+",
    "\u00e4",
    "a\x00",
    "a b",
    "-a",
    "x" * 10_000,
)
MODEL = {"base": "b", "vocab_size": 9, "context_length": 9}
# Not understood, no such thing, no such method: never 429 or 401, which would say nothing of the id.
REFUSED = {400, 403, 404, 405, 422}


@dataclass
class Watched:
    """A key service behind uvicorn: the paths that reached it, and what it asked Vault for."""

    world: World
    version: int
    proxy: StatusProxy
    url: str = ""
    paths: list[bytes] = field(default_factory=list)

    def watch(self, app: ASGIApp) -> ASGIApp:
        async def noted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                self.paths.append(scope["raw_path"])
            await app(scope, receive, send)

        return noted

    def ask(self, role: Role, method: str, path: str, body: Any) -> int:
        """The status of a request whose path no client has tidied up."""
        content = json.dumps(body).encode()
        lines = [
            f"{method} {path} HTTP/1.1",
            "Host: keysvc",
            f"Authorization: Bearer {self.world.secret(role)}",
            "Content-Type: application/json",
            f"Content-Length: {len(content)}",
            "Connection: close",
        ]
        server = urlsplit(self.url)
        with socket.create_connection((server.hostname, server.port or 0), timeout=30) as connection:
            connection.sendall("\r\n".join([*lines, "", ""]).encode() + content)
            with connection.makefile("rb") as answer:
                return int(answer.read().split(b" ", 2)[1])

    def asked_of_vault(self) -> list[str]:
        return [f"{arrival.method} {arrival.path}" for arrival in self.proxy.arrived]


@pytest.fixture
def watched(world: World, place: Place) -> Iterator[Watched]:
    """With an ACTIVE version whose root is opened by Vault each time, and all tokens at hand."""
    server = place.server
    with StatusProxy(server.url, authority=server.ca_file, certificate=server.certificate) as proxy:
        wrapper = VaultTransitWrapper(place.open(address=proxy.url))
        wrapper.check()
        world.service = replace(world.service, wrapper=wrapper, roots=RootCache(most=1, longest_s=0))
        world.model()
        made = Watched(world, world.active(), proxy)
        with serving(made.watch(build_app(world.service, world.measured))) as made.url:
            proxy.heal()
            yield made
        place.close()


def paths(model: str, version: object, *, tenant: str = "acme", operation: str = "o") -> list[str]:
    """Every kind of route that leads to a KEK."""
    at = f"/v1/tenants/{tenant}"
    return [
        at,
        f"{at}/models/{model}/keys:rotate",
        f"{at}/models/{model}/keys/{version}:release",
        f"{at}/operations/{operation}:cancel",
        f"{at}/webhooks",
        f"{at}/webhooks/{operation}:test",
    ]


def hostile_paths(hostile: str, version: int) -> set[str]:
    """Those routes with the id in each of its places."""
    everywhere = {
        *paths("chat", version, tenant=hostile),
        *paths(hostile, version),
        *paths("chat", hostile),
        *paths("chat", version, operation=hostile),
    }
    return {path for path in everywhere if hostile in path}


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda value: value[:12])
def test_no_hostile_id_in_a_path_reaches_vault(watched: Watched, hostile: str) -> None:
    """In every place of every path, as it was written: refused by us, and Vault is not asked for anything."""
    asked = hostile_paths(hostile, watched.version)
    for path in asked:
        for role in (Role.PLATFORM, Role.ADMIN):
            for method in ("GET", "POST", "DELETE"):
                status = watched.ask(role, method, path, {"purpose": "client", "id": hostile})
                assert status in REFUSED, (method, path[:80], status)
    # A blank or a letter beyond ASCII is no HTTP: the server says so before anyone reads the path.
    if hostile.isascii() and " " not in hostile:
        assert set(watched.paths) == {path.encode() for path in asked}
    assert watched.asked_of_vault() == []


def test_no_hostile_id_in_a_body_becomes_a_tenant_or_model(watched: Watched) -> None:
    """Refused, each of them, and nothing of that name is there."""
    for hostile in IN_BODIES:
        assert watched.ask(Role.PLATFORM, "POST", "/v1/tenants", {"id": hostile}) == 422, hostile[:20]
        model = {"id": hostile, **MODEL}
        assert watched.ask(Role.ADMIN, "POST", "/v1/tenants/acme/models", model) == 422, hostile[:20]
    assert watched.world.sql("SELECT id FROM tenant") == [("acme",)]
    assert watched.world.sql("SELECT id FROM model") == [("chat",)]
    assert watched.asked_of_vault() == []


def test_a_good_id_reaches_vault(watched: Watched) -> None:
    """What shows that the others would have been seen: the same requests with ids that exist."""
    release, rotate = (f"/v1/tenants/acme/models/chat/keys{rest}" for rest in ("/1:release", ":rotate"))
    assert watched.ask(Role.CLIENT, "POST", release, {"purpose": "client"}) == 200
    assert any("/decrypt/" in line for line in watched.asked_of_vault())
    assert watched.ask(Role.ADMIN, "POST", rotate, None) == 202
    assert any("/encrypt/" in line for line in watched.asked_of_vault())
    assert watched.ask(Role.PLATFORM, "POST", "/v1/tenants", {"id": "good"}) == 201
    assert watched.ask(Role.ADMIN, "POST", "/v1/tenants/acme/models", {"id": "good", **MODEL}) == 201
