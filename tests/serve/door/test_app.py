"""The door and the shape of Ray's own answers, without Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest

from anamorph.serve.applications.door import build
from anamorph.serve.cluster.proxy import OpenAIShape, middlewares
from anamorph.serve.door.app import Door
from anamorph.serve.door.handles import Handles
from anamorph.wire.serving import DoorState, Ended, Route

if TYPE_CHECKING:
    from tests.serve.conftest import Issuer

NOW = 1_800_000_000.0


@pytest.fixture
def http(issuer: Issuer) -> httpx.AsyncClient:
    """A door with one version in every state, and three of the past; every request has a valid token."""
    states = ["serving", "suspended", "gone", "pending"]
    routes = [
        Route(tenant="acme", model="smol", version=v, key_id="k", status=s)
        for v, s in enumerate(states, start=1)
    ]
    door = Door(Handles(), lambda: NOW)
    ended = Ended(tenant="acme", model="smol", up_to=7)
    door.reconfigure(DoorState(jwks=issuer.jwks, routes=tuple(routes), ended=(ended,)))
    headers = {"Authorization": f"Bearer {issuer.token()}"}
    transport = httpx.ASGITransport(door.app())
    return httpx.AsyncClient(transport=transport, base_url="http://door", headers=headers)


@pytest.mark.parametrize(
    ("path", "status", "code", "retry"),
    [
        ("/acme/smol/v1/v1/completions", 503, "unavailable", "1"),
        ("/acme/smol/v2/v1/completions", 403, "suspended", None),
        ("/acme/smol/v3/v1/completions", 410, "key_gone", None),
        ("/acme/smol/v4/v1/completions", 503, "unavailable", "5"),
        ("/acme/smol/v4", 503, "unavailable", "5"),
        ("/acme/smol/v5/v1/completions", 410, "key_gone", None),
        ("/acme/smol/v7/usage", 410, "key_gone", None),
        ("/acme/smol/v8/v1/completions", 404, "not_found", None),
        ("/acme/smol/v0/v1/completions", 404, "not_found", None),
        ("/acme/smol/v01/v1/completions", 404, "not_found", None),
        ("/acme/smol", 404, "not_found", None),
        ("/", 404, "not_found", None),
        ("/globex/smol/v1/v1/completions", 401, "invalid_token", None),
        ("/acme/other/v1/v1/completions", 401, "invalid_token", None),
    ],
)
async def test_the_door_says_what_is_the_matter(
    http: httpx.AsyncClient, path: str, status: int, code: str, retry: str | None
) -> None:
    """Every state has its answer; another tenant's versions are not even admitted to exist."""
    response = await http.post(path, json={"prompt": "text"})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.headers.get("retry-after") == retry


async def test_the_door_asks_for_a_token_first(http: httpx.AsyncClient) -> None:
    """Without one nothing is said about any version; only the door's own health is open."""
    for path in ("/acme/smol/v3/v1/models", "/nothing"):
        assert (await http.get(path, headers={"Authorization": "Bearer x"})).status_code == 401
    assert (await http.get("/healthz", headers={"Authorization": ""})).status_code == 200


def test_the_door_takes_no_arguments() -> None:
    """Settings of an application given to the door are a mistake, not something to ignore."""
    with pytest.raises(ValueError, match="no arguments"):
        build({"tenant": "acme"})


def rays(status: int, kind: str, *, fail: bool = False) -> httpx.AsyncClient:
    """Ray's proxy as far as the middleware sees it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG001
        if status:
            head = {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-type", kind.encode())],
            }
            await send(head)
            await send({"type": "http.response.body", "body": b"Ray's", "more_body": fail})
        if fail:
            raise RuntimeError("the replica died")

    (middleware,) = middlewares()
    assert str(middleware.cls) == str(OpenAIShape)
    return httpx.AsyncClient(transport=httpx.ASGITransport(OpenAIShape(app)), base_url="http://ray")


@pytest.mark.parametrize(
    ("status", "becomes", "code"),
    [
        (500, 503, "unavailable"),
        (503, 503, "unavailable"),
        (408, 503, "unavailable"),
        (404, 404, "not_found"),
    ],
)
async def test_rays_own_errors_get_our_shape(status: int, becomes: int, code: str) -> None:
    """Text of Ray's never reaches a client; what may be retried says when."""
    response = await rays(status, "text/plain").get("/acme/smol/v1/v1/models")
    assert (response.status_code, response.json()["error"]["code"]) == (becomes, code)
    assert response.headers.get("retry-after") == ("1" if becomes == 503 else None)


async def test_our_own_answers_pass_unchanged() -> None:
    """Errors of ours are JSON and stay, answers that are no errors too, Ray's own pages as well."""
    for status, kind in ((500, "application/json"), (200, "text/event-stream")):
        response = await rays(status, kind).get("/acme/smol/v1/v1/models")
        assert (response.status_code, response.text) == (status, "Ray's")
    assert (await rays(503, "text/plain").get("/-/healthz")).text == "Ray's"


async def test_a_replica_that_dies_is_a_503_or_a_cut_connection() -> None:
    """Before the answer began a client may try again; after, it must notice that the answer is cut."""
    response = await rays(0, "", fail=True).get("/acme/smol/v1/v1/models")
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    with pytest.raises(RuntimeError):
        await rays(200, "text/event-stream", fail=True).get("/acme/smol/v1/v1/models")
