"""A turn of the operator over a real key service: what it reads, and that nothing is lost by reading less."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from sqlalchemy import event

from anamorph.wire.admin import Role
from anamorph.wire.keyservice import AsyncKeyService
from anamorph.wire.serving import DoorState, Usage
from anamorph.wire.states import ONGOING, State
from anamorph_keysvc.service import lifecycle
from anamorph_operator import actions as act
from anamorph_operator.local import LocalJobs, Workplace
from anamorph_operator.probe import Prober, Tokens
from anamorph_operator.processes import Processes
from anamorph_operator.ray_serve import RayServe, from_config
from anamorph_operator.reconciler import Reconciler, Settings

if TYPE_CHECKING:
    from tests.keysvc.conftest import World

SERVE = "http://serve"
AT = ("acme", "chat")
BEFORE = "'2029-01-01 00:00:00.000000'"
AFTER = "'2039-01-01 00:00:00.000000'"
ARTIFACT = json.dumps({"replica": "r", "manifest_sha256": "0" * 64, "probe": {"prompts": [], "expected": []}})
BEGIN = f"""
INSERT INTO key_version (tenant, model, version, state, row_version, created_at, updated_at, served_tokens,
    key_id, kcv, vocab_kcv, public_key)
SELECT tenant, id, last_version, 'PENDING', 1, {BEFORE}, {BEFORE}, 0,
    tenant || '.v' || CAST(last_version AS TEXT), 'k', 'k', 'AAAA' FROM model
"""
CHANGED = "row_version = row_version + 1"
LIVES = (
    ("MATERIALIZING", "updated_at = updated_at"),
    ("STAGED", f"artifact = '{ARTIFACT}'"),
    (
        "ACTIVE",
        f"activated_at = {BEFORE}, endpoint = '{SERVE}/' || tenant || '/' || model || '/v' || version",
    ),
    ("DRAINING", f"drain_until = {BEFORE}"),
    ("RETIRED", "updated_at = updated_at"),
)


def live(world: World, upto: State, versions: int = 1) -> None:
    """Each model's next versions, one after the other, from PENDING up to a state."""
    for _ in range(versions):
        world.sql("UPDATE model SET last_version = last_version + 1")
        world.sql(BEGIN)
        former = "PENDING"
        for state, changes in LIVES:
            world.sql(
                f"UPDATE key_version SET state = '{state}', {CHANGED}, {changes}"
                f" WHERE state = '{former}' AND version = (SELECT last_version FROM model"
                " WHERE model.tenant = key_version.tenant AND model.id = key_version.model)"
            )
            former = state
            if state == upto:
                break


class Ray:
    """Ray's dashboard and what it serves, as far as the operator sees them: all that is written runs."""

    def __init__(self) -> None:
        self.written: list[dict[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/usage"):
            return httpx.Response(200, json=Usage(source="p", tokens=0).model_dump())
        if request.method == "PUT":
            self.written = json.loads(request.content)["applications"]
        elif "nodes" in request.url.path:
            return httpx.Response(503)
        running = {one["name"]: {"status": "RUNNING", "deployed_app_config": one} for one in self.written}
        return httpx.Response(200, json={"applications": running})

    @property
    def names(self) -> list[str]:
        return [one["name"] for one in self.written]

    @property
    def door(self) -> DoorState:
        application = from_config(self.written[0])
        assert application is not None
        assert isinstance(application.state, DoorState)
        return application.state


class Counted(httpx.AsyncBaseTransport):
    """Counts requests by path on their way to the key service."""

    def __init__(self, inner: httpx.AsyncBaseTransport) -> None:
        self._inner = inner
        self.paths: Counter[str] = Counter()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.paths[request.url.path] += 1
        return await self._inner.handle_async_request(request)


class Turning:
    """An operator over a world's key service and a Ray."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.ray, self.transport = world, Ray(), Counted(world.transport())
        self.keys = AsyncKeyService("http://keysvc", world.secret(Role.PLATFORM), transport=self.transport)
        http = httpx.AsyncClient(transport=httpx.MockTransport(self.ray), base_url=SERVE)
        prober = Prober(http, Tokens(self.keys.inference_token, world.clock), world.clock)
        store = f"file://{folder}"
        place = Workplace("http://keysvc", store, folder)
        jobs = LocalJobs(place, self.keys, Processes(("false",), world.clock))
        serve = RayServe(http, SERVE)
        self.operator = Reconciler(Settings(SERVE, store), self.keys, serve, jobs, prober, world.clock)

    async def turn(self) -> list[type[act.Action]]:
        return [type(action) for action in await self.operator.turn()]

    async def cost(self) -> tuple[Counter[str], int]:
        """Requests of one turn to the key service, and the statements that they are answered with."""
        statements = []
        engine = self.world.service.database.engine

        def note(*call: Any) -> None:
            statements.append(call[2])

        self.transport.paths.clear()
        event.listen(engine, "before_cursor_execute", note)
        await self.turn()
        event.remove(engine, "before_cursor_execute", note)
        return Counter(self.transport.paths), len(statements)


@pytest.fixture
def turning(world: World, tmp_path: Path) -> Turning:
    (tmp_path / "store").mkdir()
    return Turning(world, tmp_path / "store")


async def test_a_turn_costs_the_same_however_many_versions_have_been(world: World, turning: Turning) -> None:
    """Requests and statements, with every version of before retired, or waiting to be destroyed."""
    for number in range(3):
        world.model(f"t{number}")
    live(world, State.ACTIVE)
    await turning.turn()
    before = await turning.cost()
    world.sql(f"UPDATE key_version SET state = 'DRAINING', drain_until = {AFTER}, {CHANGED}")
    live(world, State.RETIRED, versions=6)
    world.sql(
        f"UPDATE key_version SET state = 'DESTROY_SCHEDULED', previous_state = 'RETIRED', {CHANGED},"
        f" destroy_at = {AFTER} WHERE state = 'RETIRED' AND version % 2 = 0"
    )
    await turning.turn()
    assert await turning.cost() == before
    assert len([route for route in turning.ray.door.routes if route.status == "serving"]) == 3
    assert {(ended.tenant, ended.up_to) for ended in turning.ray.door.ended} == {
        (f"t{number}", 7) for number in range(3)
    }


async def test_a_version_that_has_ended_is_followed_until_nothing_of_it_stands(
    world: World, turning: Turning
) -> None:
    """It is read by itself while its application stands: told that it is gone, then taken out."""
    world.model()
    version = world.active()
    await turning.turn()
    assert turning.ray.names == ["door", "acme.chat.v1"]
    world.do(lifecycle.revoke, *AT, version, None)
    assert act.Apply in await turning.turn()
    assert turning.ray.written[1]["deployments"][0]["user_config"]["status"] == "gone"
    assert [route.status for route in turning.ray.door.routes] == ["gone"]
    await turning.turn()
    assert turning.ray.names == ["door"]
    await turning.turn()
    assert turning.ray.door.routes == ()
    assert [(one.tenant, one.model, one.up_to) for one in turning.ray.door.ended] == [(*AT, 1)]
    assert await turning.turn() == []


async def test_a_version_is_listed_again_when_it_is_due_to_be_destroyed(
    world: World, turning: Turning, tmp_path: Path
) -> None:
    """Not before: until then its history costs nothing."""
    world.model()
    world.artifact = replica_in(world, tmp_path / "store")
    version = world.active()
    world.do(lifecycle.revoke, *AT, version, None)
    world.do(lifecycle.destroy, *AT, version, None)
    world.clock.advance(99)
    assert await turning.turn() == [act.Apply]
    assert await turning.turn() == []
    world.clock.advance(1)
    assert await turning.turn() == [act.DeleteReplica]
    assert await turning.turn() == [act.Destroyed]
    assert await turning.turn() == []


def replica_in(world: World, store: Path) -> Any:
    (store / "r").mkdir()
    return world.artifact.model_copy(update={"replica": f"file://{store}/r"})


async def test_an_application_of_a_version_that_nobody_knows_stays(world: World, turning: Turning) -> None:
    """As after a restore of the key service's database from an older copy."""
    world.model()
    world.active()
    while await turning.turn():
        pass
    config = json.loads(json.dumps(turning.ray.written[1]).replace("v1", "v9").replace(": 1,", ": 9,"))
    turning.ray.written.append(config)
    assert from_config(config) == replace(from_config(turning.ray.written[-1]))  # type: ignore[type-var]
    assert await turning.turn() == []
    assert turning.ray.names == ["door", "acme.chat.v1", "acme.chat.v9"]


@pytest.mark.parametrize(
    ("query", "index"),
    [
        ({"state": sorted(ONGOING)}, "ix_key_version_ongoing"),
        ({"due": ["true"]}, "ix_key_version_destroy_at"),
    ],
)
async def test_what_a_turn_lists_has_an_index_of_its_own(
    world: World, query: dict[str, list[str]], index: str
) -> None:
    """The databases see that its condition covers the list's: they can take it."""
    asked: list[tuple[str, Any]] = []
    engine = world.service.database.engine

    def note(*call: Any) -> None:
        asked.append((call[2], call[3]))

    event.listen(engine, "before_cursor_execute", note)
    async with world.http(world.secret(Role.PLATFORM)) as http:
        assert (await http.get("/v1/versions", params=query)).json()["items"] == []
    event.remove(engine, "before_cursor_execute", note)
    [(statement, values)] = [one for one in asked if "FROM key_version" in one[0]]
    assert index in plan_of(world, statement, values, index)


def plan_of(world: World, statement: str, values: Any, index: str) -> str:
    """How the statement would be answered with the one index; SQLite refuses where it cannot be."""
    with world.admin.connect() as connection:
        if world.dialect == "sqlite":
            explain = "EXPLAIN QUERY PLAN " + statement.replace("WHERE", f"INDEXED BY {index} WHERE", 1)
        else:
            explain = "EXPLAIN " + statement
            # On an empty table any index costs the same.
            connection.exec_driver_sql("ALTER TABLE key_version DROP CONSTRAINT pk_key_version CASCADE")
            connection.exec_driver_sql("DROP INDEX ix_key_version_state; SET LOCAL enable_seqscan = off")
        plan = str(list(connection.exec_driver_sql(explain, values)))
        connection.rollback()
    return plan
