"""Who may call what: every route of the application against every kind of credential."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from fastapi.routing import APIRoute
from sqlmodel import select

from anamorph.wire.admin import Role
from anamorph_keysvc.scope import PLATFORM
from anamorph_keysvc.tables import Operation

if TYPE_CHECKING:
    from tests.keysvc.conftest import World

TENANT = "/v1/tenants/{tenant}"
MODEL = TENANT + "/models/{model}"
KEY = MODEL + "/keys/{version:int}"
WEBHOOK = TENANT + "/webhooks/{webhook:id}"
ANYONE = "admin rotator client materializer auditor platform"
PUBLIC = "public"

# The table of docs/design/contracts.md, written out once more.
WHO: dict[str, str] = {
    "POST /v1/tenants": "platform",
    "GET /v1/tenants": "platform",
    f"GET {TENANT}": "platform",
    f"POST {TENANT}/api-keys": "platform admin",
    f"GET {TENANT}/api-keys": "platform admin",
    f"DELETE {TENANT}/api-keys/{{key}}": "platform admin",
    f"GET {TENANT}/audit": "auditor admin",
    f"GET {TENANT}/quota": "platform admin",
    f"PATCH {TENANT}/quota": "platform",
    f"POST {TENANT}/webhooks": "admin",
    f"GET {TENANT}/webhooks": "admin",
    f"GET {WEBHOOK}": "admin",
    f"DELETE {WEBHOOK}": "admin",
    f"POST {WEBHOOK}:test": "admin",
    f"GET {WEBHOOK}/deliveries": "admin",
    f"POST {TENANT}/models": "platform admin",
    f"GET {TENANT}/models": ANYONE,
    f"GET {MODEL}": ANYONE,
    f"PATCH {MODEL}": "platform admin",
    f"GET {MODEL}/rotation-policy": "platform admin",
    f"PATCH {MODEL}/rotation-policy": "platform admin",
    f"POST {MODEL}/keys:rotate": "admin rotator platform",
    f"GET {MODEL}/keys": ANYONE,
    f"GET {KEY}": ANYONE,
    f"POST {KEY}:suspend": "admin rotator",
    f"POST {KEY}:resume": "admin rotator",
    f"POST {KEY}:revoke": "platform admin",
    f"POST {KEY}:destroy": "platform admin",
    f"POST {KEY}:restore": "admin",
    f"POST {KEY}:materialize": "platform materializer",
    f"POST {KEY}:release": "client admin grant",
    f"POST {KEY}:progress": "grant",
    f"POST {KEY}:stage": "grant",
    f"POST {KEY}:fail": "platform grant",
    f"POST {KEY}:activate": "platform admin",
    f"POST {KEY}:readdress": "platform",
    f"POST {KEY}:retire": "platform",
    f"POST {KEY}:destroyed": "platform",
    f"POST {KEY}:usage": "platform",
    f"GET {TENANT}/operations": ANYONE,
    f"GET {TENANT}/operations/{{operation:id}}": ANYONE,
    f"POST {TENANT}/operations/{{operation:id}}:cancel": "admin rotator platform",
    f"POST {MODEL}/inference-tokens": "client admin platform",
    "GET /v1/inference-keys": PUBLIC,
    "GET /v1/versions": "platform",
    "GET /v1/models": "platform",
    "POST /v1/inference-keys:rotate": "platform",
    "POST /v1/backups": "platform",
    "GET /livez": PUBLIC,
    "GET /readyz": PUBLIC,
    "GET /metrics": PUBLIC,
    "GET /openapi.json": PUBLIC,
}
ARTIFACT: dict[str, object] = {
    "replica": "file:///r",
    "manifest_sha256": "0" * 64,
    "probe": {"prompts": [[1]], "expected": [[2]]},
}
MODEL_BODY: dict[str, object] = {"id": "m", "base": "b", "vocab_size": 9, "context_length": 9}
BODIES: dict[str, dict[str, object]] = {
    "POST /v1/tenants": {"id": "initech"},
    "POST /v1/backups": {"taken_at": "2029-12-31T00:00:00Z"},
    f"POST {TENANT}/api-keys": {"name": "n", "role": "client"},
    f"POST {TENANT}/models": MODEL_BODY,
    f"PATCH {MODEL}": {"dtype": "float32"},
    f"PATCH {MODEL}/rotation-policy": {},
    f"PATCH {TENANT}/quota": {},
    f"POST {TENANT}/webhooks": {"url": "http://refused.test"},
    f"POST {KEY}:release": {"purpose": "client"},
    f"POST {KEY}:progress": {"phase": "p", "done": 0.5},
    f"POST {KEY}:stage": ARTIFACT,
    f"POST {KEY}:fail": {"reason": "r"},
    f"POST {KEY}:activate": {"endpoint": "http://e"},
    f"POST {KEY}:readdress": {"endpoint": "http://e"},
    f"POST {KEY}:usage": {"source": "s", "tokens": 1},
}


def routes_of(world: World) -> set[str]:
    """Every route that the application answers, as ``METHOD path``."""
    found = set()
    pending = list(world.app.routes)
    while pending:
        route = pending.pop()
        pending.extend(getattr(getattr(route, "original_router", None), "routes", []))
        if isinstance(route, APIRoute):
            found |= {f"{method} {route.path}" for method in route.methods or ()}
    return found


def path_for(route: str, tenant: str, operation: str, key: str) -> str:
    path = route.partition(" ")[2]
    values = {"tenant": tenant, "model": "chat", "version": "1", "operation": operation, "key": key}
    values["webhook"] = "whk_none"
    return re.sub(r"{(\w+)(:int|:id)?}", lambda match: values[match[1]], path)


async def status(world: World, route: str, path: str, token: str | None, body: object = None) -> int:
    content = BODIES.get(route) if body is None else body
    async with world.http(token) as http:
        response = await http.request(route.partition(" ")[0], path, json=content)
    return response.status_code


def admitted(answer: int) -> bool:
    """Whether a status says that the caller may, whatever became of the request."""
    return answer not in {401, 403, 405} and answer < 500


@pytest.fixture
def two_tenants(world: World) -> World:
    for tenant in ("acme", "globex"):
        world.model(tenant)
        world.rotate(tenant)
    return world


def operation_of(world: World, tenant: str) -> str:
    with world.service.database.read(PLATFORM) as session:
        return session.exec(select(Operation.id).where(Operation.tenant == tenant)).one()


def test_every_route_of_the_application_stands_in_the_table(world: World) -> None:
    """A route that nobody has decided the callers of does not exist."""
    assert routes_of(world) == set(WHO)


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.PLATFORM])
async def test_a_role_reaches_its_routes_in_its_own_tenant_only(two_tenants: World, role: Role) -> None:
    """A tenant's key: not refused where its role is admitted, 403 elsewhere, 404 for another tenant."""
    world = two_tenants
    token = world.secret(role)
    for route, who in WHO.items():
        own = path_for(route, "acme", operation_of(world, "acme"), "key_none")
        foreign = path_for(route, "globex", operation_of(world, "globex"), "key_none")
        answer = await status(world, route, own, token)
        if who != PUBLIC and role.value not in who.split():
            assert answer == 403, (route, answer)
        else:
            assert admitted(answer), (route, answer)
        if "{tenant}" in route:
            assert await status(world, route, foreign, token) == 404, route


async def test_the_platform_key_reaches_only_what_is_the_platforms(two_tenants: World) -> None:
    """The platform manages tenants but neither reads their audit nor releases their keys."""
    world = two_tenants
    token = world.secret(Role.PLATFORM)
    for route, who in WHO.items():
        path = path_for(route, "acme", operation_of(world, "acme"), "x")
        answer = await status(world, route, path, token)
        if who == PUBLIC or "platform" in who.split():
            assert admitted(answer), (route, answer)
        else:
            assert answer == 403, (route, answer)


async def test_a_grant_reaches_its_own_version_only(two_tenants: World) -> None:
    """A grant: 401 on every route that takes none, 404 on any version but its own."""
    world = two_tenants
    token = world.grant(1)
    for route, who in WHO.items():
        foreign = path_for(route, "globex", operation_of(world, "globex"), "x")
        body = {"purpose": "materialize"} if route.endswith(":release") else None
        answer = await status(world, route, foreign, token, body)
        if who == PUBLIC:
            assert answer == 200, route
        else:
            assert answer == (404 if "grant" in who.split() else 401), (route, answer)


async def test_a_grant_does_not_release_client_keys_nor_a_key_the_root(two_tenants: World) -> None:
    """Each purpose of a release has its own kind of credential."""
    world = two_tenants
    path = path_for(f"POST {KEY}:release", "acme", "", "")
    for token, purpose in ((world.grant(1), "client"), (world.secret(Role.ADMIN), "materialize")):
        assert await status(world, f"POST {KEY}:release", path, token, {"purpose": purpose}) == 403


@pytest.mark.parametrize(
    "kind", ["none", "inference token", "unknown key", "unknown grant", "basic", "empty"]
)
async def test_what_is_no_credential_of_ours_gets_401_on_every_route(two_tenants: World, kind: str) -> None:
    """A header captured in the compute zone, or made up, is worth nothing on any route."""
    world = two_tenants
    header = {
        "none": None,
        "inference token": f"Bearer {world.inference_token('acme', 'chat')}",
        "unknown key": "Bearer amk_" + "A" * 43,
        "unknown grant": "Bearer amg_" + "A" * 43,
        "basic": "Basic YW1rXzE6Mg==",
        "empty": "",
    }[kind]
    async with world.http() as http:
        for route, who in WHO.items():
            path = path_for(route, "acme", operation_of(world, "acme"), "x")
            headers = {} if header is None else {"Authorization": header}
            method = route.partition(" ")[0]
            response = await http.request(method, path, json=BODIES.get(route), headers=headers)
            public = who == PUBLIC and kind in {"none", "unknown key", "unknown grant"}
            assert response.status_code == (200 if public else 401), (route, response.status_code)


async def test_a_revoked_key_is_refused_at_once(two_tenants: World) -> None:
    """Revocation takes effect with the next request."""
    world = two_tenants
    async with world.client(Role.PLATFORM) as platform, world.client(Role.ADMIN) as admin:
        own = (await platform.list_api_keys("acme")).items[0]
        assert (await admin.get_model("acme", "chat")).id == "chat"
        revoked = await platform.revoke_api_key("acme", own.id)
    assert revoked.revoked_at == world.clock.now
    path = "/v1/tenants/acme/models/chat"
    assert await status(world, f"GET {MODEL}", path, world.secret(Role.ADMIN)) == 401


async def test_another_tenants_objects_do_not_answer_to_their_ids(two_tenants: World) -> None:
    """An operation or API key of another tenant is not found under one's own path either."""
    world = two_tenants
    world.secret(Role.CLIENT, "globex")
    async with world.client(Role.PLATFORM) as platform:
        foreign = (await platform.list_api_keys("globex")).items[0].id
    token = world.secret(Role.ADMIN)
    operation = operation_of(world, "globex")
    for route, path in (
        (f"GET {TENANT}/operations/x", f"/v1/tenants/acme/operations/{operation}"),
        (f"POST {TENANT}/operations/x:cancel", f"/v1/tenants/acme/operations/{operation}:cancel"),
        (f"DELETE {TENANT}/api-keys/x", f"/v1/tenants/acme/api-keys/{foreign}"),
    ):
        assert await status(world, route, path, token) == 404, route


async def test_a_tenants_admin_cannot_make_a_platform_key(two_tenants: World) -> None:
    """No key of a tenant leads above the tenant."""
    path = "/v1/tenants/acme/api-keys"
    token = two_tenants.secret(Role.ADMIN)
    body = {"name": "n", "role": "platform"}
    assert await status(two_tenants, f"POST {TENANT}/api-keys", path, token, body) == 422


async def test_only_the_platform_gets_tokens_for_the_plaintext_baseline(two_tenants: World) -> None:
    """The baseline's token is the operator's; a tenant's key does not see that tenant."""
    path, route = "/v1/tenants/plaintext/models/chat/inference-tokens", f"POST {MODEL}/inference-tokens"
    assert await status(two_tenants, route, path, two_tenants.secret(Role.PLATFORM)) == 200
    assert await status(two_tenants, route, path, two_tenants.secret(Role.CLIENT)) == 404
