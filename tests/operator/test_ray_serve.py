"""Ray's REST API: what is written is what is read, and failures of Ray are told apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from anamorph import errors
from anamorph.serve.cluster.placement import Node, Room
from anamorph.wire.admin import Autoscaling, PublicKey
from anamorph.wire.serving import (
    DoorState,
    EngineSettings,
    KeyState,
    PoolMember,
    PoolSettings,
    PoolState,
)
from anamorph_operator.ray_serve import RayServe, as_config, from_config
from anamorph_operator.state import Application, AppStatus

DOOR = Application("door", "/", None, DoorState(jwks=(PublicKey(kid="k", x="x"),)))
ENGINE = Application(
    "acme.smol.v1",
    "/acme/smol/v1",
    EngineSettings(tenant="acme", model="smol", version=1, replica="file:///r", context_length=64),
    KeyState(status="suspended"),
)


SLEEPING = Application(
    "acme.smol.v2",
    None,
    EngineSettings(
        tenant="acme",
        model="smol",
        version=2,
        replica="file:///r",
        context_length=64,
        autoscaling=Autoscaling(min_replicas=0),
    ),
    KeyState(),
)
MEMBER = PoolMember(
    tenant="acme",
    model="smol",
    version=3,
    replica="file:///r",
    key_id="k",
    public_key="A" * 43 + "=",
    manifest_sha256="0" * 64,
)
POOL = Application(
    "shared.small", None, PoolSettings(pool="small", context_length=64), PoolState(members=(MEMBER,))
)


def ray(handler: Callable[[httpx.Request], httpx.Response]) -> RayServe:
    http = httpx.AsyncClient(base_url="http://ray", transport=httpx.MockTransport(handler))
    return RayServe(http, "http://127.0.0.1:8000")


@pytest.mark.parametrize("application", [DOOR, ENGINE, SLEEPING, POOL])
def test_an_entry_survives_the_way_through_ray(application: Application) -> None:
    """Ray adds fields of its own; what we wrote is read back equal, so nothing is written twice."""
    kept = json.loads(json.dumps(as_config(application))) | {"runtime_env": {}, "host": "0.0.0.0"}
    assert from_config(kept) == application


def test_only_what_was_set_is_written() -> None:
    """A release that adds a field with a default does not change the arguments of what stands."""
    assert "max_queued" not in as_config(ENGINE)["args"]


@pytest.mark.parametrize("config", [{}, {"import_path": "x:y"}, as_config(ENGINE) | {"args": {"odd": 1}}])
def test_a_foreign_entry_is_not_taken_for_ours(config: dict[str, Any]) -> None:
    """What does not parse is no application of ours and will be replaced."""
    assert from_config(config) is None


async def test_status_and_time_are_read() -> None:
    """Every application comes with Ray's status, message and time of deployment."""
    details = {
        "status": "DEPLOY_FAILED",
        "message": "no",
        "last_deployed_time_s": 0,
        "deployed_app_config": as_config(ENGINE),
    }
    read = await ray(lambda _: httpx.Response(200, json={"applications": {ENGINE.name: details}})).read()
    found = read[ENGINE.name]
    assert (found.status, found.message) == (AppStatus.DEPLOY_FAILED, "no")
    assert found.deployed_at == datetime.fromtimestamp(0, UTC)
    assert found.application == ENGINE


@pytest.mark.parametrize(
    ("application", "replicas", "status"),
    [
        (SLEEPING, [], AppStatus.DEPLOY_FAILED),
        (SLEEPING, [{"state": "STARTING"}], AppStatus.UNHEALTHY),
        (ENGINE, [], AppStatus.UNHEALTHY),
    ],
)
async def test_what_could_not_wake_has_failed(
    application: Application, replicas: list[Any], status: AppStatus
) -> None:
    """Ray calls it unhealthy and tries no more; one with a replica, or always one, it mends by itself."""
    details = {
        "status": "UNHEALTHY",
        "deployed_app_config": as_config(application),
        "deployments": {"engine": {"replicas": replicas}},
    }
    body = {"applications": {application.name: details}}
    assert (await ray(lambda _: httpx.Response(200, json=body)).read())[application.name].status is status


async def test_nodes_are_asked_of_rays_state_api() -> None:
    """All of them, not the first hundred that it tells unasked."""
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        node = {"state": "ALIVE", "node_ip": "127.0.0.1", "node_id": "ab", "resources_total": {"CPU": 2.0}}
        return httpx.Response(200, json={"data": {"result": {"result": [node]}}})

    assert await ray(answer).nodes() == (Node("127.0.0.1/ab", Room(2)),)
    assert asked == ["http://ray/api/v0/nodes?limit=10000&detail=true"]


async def test_the_whole_list_is_written_in_order() -> None:
    """One PUT with everything, door first, and the HTTP options that Serve was started with."""
    seen: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((request.method, json.loads(request.content)))
        return httpx.Response(200)

    await ray(answer).write((DOOR, ENGINE))
    [(method, body)] = seen
    assert method == "PUT"
    assert [one["name"] for one in body["applications"]] == ["door", "acme.smol.v1"]
    assert body["http_options"] == {"host": "127.0.0.1", "port": 8000}


async def test_a_refused_list_is_not_an_absent_ray() -> None:
    """400 is a mistake of ours; anything else means that Ray cannot answer now."""
    with pytest.raises(errors.BadRequest):
        await ray(lambda _: httpx.Response(400, text="bad")).write((DOOR,))
    with pytest.raises(errors.Unavailable):
        await ray(lambda _: httpx.Response(500)).read()


async def test_an_unreachable_dashboard_is_unavailable() -> None:
    """A refused connection is waited out, not a crash."""

    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with pytest.raises(errors.Unavailable):
        await ray(refuse).read()
