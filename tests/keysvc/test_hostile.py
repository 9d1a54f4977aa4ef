"""Values that break naive servers, in every field of every body: refused or taken, never a 500."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from anamorph.wire.admin import Role

if TYPE_CHECKING:
    from tests.keysvc.conftest import World

MODEL = "/v1/tenants/acme/models/chat"
PROBE = {"prompts": [[1]], "expected": [[2]]}
BODIES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("platform", "POST", "/v1/tenants", {"id": "initech", "display_name": "d"}),
    ("admin", "POST", "/v1/tenants/acme/api-keys", {"name": "n", "role": "client"}),
    (
        "admin",
        "POST",
        "/v1/tenants/acme/models",
        {"id": "m", "base": "b", "vocab_size": 9, "context_length": 9, "policy": {}, "dtype": "auto"},
    ),
    (
        "admin",
        "PATCH",
        MODEL + "/rotation-policy",
        {"grace_s": 900, "period_s": 60, "token_budget": 1, "destroy_delay_s": 5, "client_cache_ttl_s": 1},
    ),
    ("admin", "POST", MODEL + "/keys/1:release", {"purpose": "client"}),
    ("admin", "POST", MODEL + "/keys/1:activate", {"endpoint": "http://e"}),
    ("platform", "POST", MODEL + "/keys/1:readdress", {"endpoint": "http://e"}),
    ("platform", "POST", MODEL + "/keys/1:usage", {"source": "s", "tokens": 1}),
    ("grant", "POST", MODEL + "/keys/1:progress", {"phase": "p", "done": 0.5}),
    (
        "grant",
        "POST",
        MODEL + "/keys/1:stage",
        {"replica": "r", "manifest_sha256": "0" * 64, "probe": PROBE},
    ),
    ("grant", "POST", MODEL + "/keys/1:fail", {"reason": "r"}),
]
# As they stand in JSON, since some of them have no Python value that a client would send.
HOSTILE = (
    "null",
    "true",
    "-1",
    "9223372036854775807",
    "1180591620717411303424",
    "1e400",
    "NaN",
    '""',
    r'"\ud800"',
    r'"\u0000"',
    '"' + "x" * 5000 + '"',
    "[]",
    "[[9223372036854775808]]",
    "{}",
    r'{"\ud800": 1}',
)


def variants(body: dict[str, Any]) -> list[str]:
    """The body with each field in turn replaced by each hostile value, and with a strange field."""
    texts = [r'{"\ud800": 1}', "[]", "null", '"text"', "[" * 5000]
    for name in body:
        for value in HOSTILE:
            fields = [f"{json.dumps(key)}: {value if key == name else json.dumps(body[key])}" for key in body]
            texts.append("{" + ", ".join(fields) + "}")
    return texts


@pytest.mark.parametrize(("who", "method", "path", "body"), BODIES, ids=lambda value: str(value)[-24:])
async def test_no_body_makes_the_service_fail(
    world: World, who: str, method: str, path: str, body: dict[str, Any]
) -> None:
    """Huge numbers, lone surrogates, deep nesting, wrong types: an answer below 500 each time."""
    world.model()
    world.rotate()
    tokens = {role.value: world.secret(role) for role in (Role.ADMIN, Role.PLATFORM)}
    tokens["grant"] = world.grant(1)
    async with world.http(tokens[who]) as http:
        for text in variants(body):
            response = await http.request(
                method, path, content=text.encode(), headers={"Content-Type": "application/json"}
            )
            assert response.status_code < 500, text[:200]


@pytest.mark.parametrize(
    "page", ["%00", "W10=", "WzFlNDAwXQ==", "WzFd", "WyJcdWQ4MDAiXQ==", "%FF", "=" * 999]
)
async def test_no_page_token_makes_the_service_fail(world: World, page: str) -> None:
    """Tokens that decode to something, but not to a place in the list, are refused."""
    world.model()
    async with world.http(world.secret(Role.PLATFORM)) as http:
        for path in ("/v1/tenants", "/v1/versions", MODEL + "/keys"):
            response = await http.get(f"{path}?page={page}")
            assert response.status_code in {200, 400, 422}, path
