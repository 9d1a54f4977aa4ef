"""Ray's REST API: what is written is what is read, and failures of Ray are told apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from anamorph import errors
from anamorph.wire.admin import PublicKey
from anamorph.wire.serving import DoorState, EngineSettings, KeyState
from anamorph_operator.ray_serve import RayServe, as_config, from_config
from anamorph_operator.state import Application, AppStatus

DOOR = Application("door", "/", None, DoorState(jwks=(PublicKey(kid="k", x="x"),)))
ENGINE = Application(
    "acme.smol.v1",
    "/acme/smol/v1",
    EngineSettings(tenant="acme", model="smol", version=1, replica="file:///r", context_length=64),
    KeyState(status="suspended"),
)


def ray(handler: Callable[[httpx.Request], httpx.Response]) -> RayServe:
    http = httpx.AsyncClient(base_url="http://ray", transport=httpx.MockTransport(handler))
    return RayServe(http, "http://127.0.0.1:8000")


@pytest.mark.parametrize("application", [DOOR, ENGINE])
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
