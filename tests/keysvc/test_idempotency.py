"""One Idempotency-Key at several processes of the service: two services on one PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle
from typing import TYPE_CHECKING

import httpx
import pytest

from anamorph import errors
from anamorph.wire.admin import Role, RotationRead
from anamorph_keysvc.app import build_app
from anamorph_keysvc.idempotency import once
from anamorph_keysvc.scope import tenant_scope
from anamorph_keysvc.service import rotation
from anamorph_keysvc.service.work import Work

if TYPE_CHECKING:
    from tests.keysvc.conftest import World

    from anamorph_keysvc.homes import Home

pytestmark = pytest.mark.parametrize(
    "database", [pytest.param("postgresql", marks=pytest.mark.real)], indirect=True
)
ROUNDS, CALLS = 8, 32


@dataclass
class Pair:
    """Two processes' worth of the service; what one keeps in memory the other does not see."""

    here: World
    there: World


@pytest.fixture
def pair(home: Home, open_homes: Callable[[Home], World]) -> Pair:
    made = Pair(open_homes(home), open_homes(home))
    made.here.model()
    return made


def rotate(work: Work) -> RotationRead:
    return rotation.rotate(work, "acme", "chat")


def refuse(_work: Work) -> RotationRead:
    raise errors.Unprocessable("no", code="no")


def ask(world: World, action: Callable[[Work], RotationRead] = rotate, *, digest: str = "d") -> RotationRead:
    with world.service.work("key:a", tenant_scope("acme")) as work:
        return once(work, "k", digest, RotationRead, action)


def test_a_key_that_another_process_works_under_is_a_conflict_to_come_back_from(pair: Pair) -> None:
    """At once, without waiting for what the first has locked; afterwards with the first one's answer."""
    with pair.here.service.work("key:a", tenant_scope("acme")) as work:
        first = once(work, "k", "d", RotationRead, rotate)
        with pytest.raises(errors.Conflict) as early:
            ask(pair.there)
    assert (early.value.code, early.value.retry_after) == ("request_in_flight", 1)
    assert ask(pair.there) == first
    with pytest.raises(errors.Unprocessable) as reused:
        ask(pair.there, digest="other")
    assert reused.value.code == "idempotency_key_reused"


def test_what_was_answered_is_repeated_by_all_at_once(pair: Pair) -> None:
    """An answer that is stored is nothing to wait for, even while another process reads it."""
    first = ask(pair.here)
    with pair.here.service.work("key:a", tenant_scope("acme")) as work:
        assert once(work, "k", "d", RotationRead, rotate) == first
        assert ask(pair.there) == first


def test_a_request_that_failed_leaves_its_key_free(pair: Pair) -> None:
    """For every process: nothing has been done under it."""
    with pytest.raises(errors.Unprocessable):
        ask(pair.here, refuse)
    assert ask(pair.there).version == 1


@pytest.mark.parametrize(("actor", "key"), [("key:b", "k"), ("key:a", "l")])
def test_a_key_in_use_keeps_no_other_request_waiting(pair: Pair, actor: str, key: str) -> None:
    """Neither the same key of another caller, nor the caller's other keys."""
    pair.here.model("globex")
    with pair.here.service.work("key:a", tenant_scope("acme")) as work:
        once(work, "k", "d", RotationRead, rotate)
        with pair.there.service.work(actor, tenant_scope("globex")) as other:
            done = once(other, key, "d", RotationRead, lambda work: rotation.rotate(work, "globex", "chat"))
    assert (done.tenant, done.version) == ("globex", 1)


async def repeated(world: World, token: str, path: str, key: str) -> httpx.Response:
    """Ask until the answer is another than that the request is still running."""
    async with world.http(token) as http:
        while True:
            answer = await http.post(path, headers={"Idempotency-Key": key})
            if answer.status_code != 409 or answer.json()["code"] != "request_in_flight":
                return answer
            assert answer.headers["retry-after"] == "1"
            await asyncio.sleep(0.02)


async def test_many_requests_under_one_key_at_two_processes_are_one_and_answered_alike(pair: Pair) -> None:
    """Spread over both, as a load balancer does: one version of each model, one answer for all."""
    for world in (pair.here, pair.there):
        limits = world.service.limits.model_copy(
            update=dict.fromkeys(("writes_per_minute", "rotations_per_minute"), 10**6)
        )
        world.app = build_app(replace(world.service, limits=limits), world.measured)
    token = pair.here.secret(Role.ROTATOR)
    for model in (f"m{number}" for number in range(ROUNDS)):
        pair.here.model(model=model)
        path = f"/v1/tenants/acme/models/{model}/keys:rotate"
        spread = zip(range(CALLS), cycle((pair.here, pair.there)))
        answers = await asyncio.gather(*(repeated(world, token, path, model) for _, world in spread))
        assert {answer.status_code for answer in answers} == {202}
        assert len({answer.text for answer in answers}) == 1
    made = dict(pair.here.sql("SELECT model, count(*) FROM key_version GROUP BY 1"))
    assert made == {f"m{number}": 1 for number in range(ROUNDS)}
