"""Served tokens, and rotations that begin by themselves."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from sqlmodel import col, select

from anamorph.wire.admin import Failure, UsageReport
from anamorph_keysvc.app import build_app
from anamorph_keysvc.scope import PLATFORM
from anamorph_keysvc.service import materialization, usage
from anamorph_keysvc.service.work import Service
from anamorph_keysvc.tables import Audit

if TYPE_CHECKING:
    from tests.keysvc.conftest import World

AT = ("acme", "chat")


def report(world: World, source: str, tokens: int) -> int:
    return world.do(usage.report, *AT, 1, UsageReport(source=source, tokens=tokens)).served_tokens


def newest(world: World) -> Audit:
    with world.service.database.read(PLATFORM) as session:
        return session.exec(select(Audit).order_by(col(Audit.sequence).desc()).limit(1)).one()


def test_reporting_twice_counts_once(world: World) -> None:
    """Per source the highest count stands, whatever order reports arrive in."""
    world.model()
    world.active()
    assert report(world, "a", 10) == 10
    assert report(world, "a", 10) == 10
    assert report(world, "b", 5) == 15
    assert report(world, "a", 7) == 15
    assert report(world, "a", 12) == 17


def test_a_spent_token_budget_begins_a_rotation(world: World) -> None:
    """At the budget, not before; once, not again while it is in flight."""
    world.model(token_budget=100)
    world.active()
    report(world, "a", 99)
    assert usage.rotate_due(world.service) == 0
    report(world, "a", 100)
    assert usage.rotate_due(world.service) == 1
    assert newest(world).detail["reason"] == "token budget"
    assert usage.rotate_due(world.service) == 0


def test_a_period_begins_a_rotation_when_it_is_over(world: World) -> None:
    """The period counts from activation."""
    world.model(period_s=60)
    world.active()
    world.clock.advance(59)
    assert usage.rotate_due(world.service) == 0
    world.clock.advance(1)
    assert usage.rotate_due(world.service) == 1
    assert (newest(world).actor, newest(world).detail["reason"]) == ("service", "period")


def test_without_a_policy_nothing_rotates_by_itself(world: World) -> None:
    """No period, no budget: no rotation, ever."""
    world.model()
    world.active()
    report(world, "a", 10**12)
    world.clock.advance(10**9)
    assert usage.rotate_due(world.service) == 0


def test_after_a_failure_automatic_rotation_waits(world: World) -> None:
    """A model that cannot be materialised does not burn through version numbers."""
    world.model(period_s=60)
    world.active()
    world.clock.advance(60)
    assert usage.rotate_due(world.service) == 1
    world.do(materialization.fail, None, *AT, 2, Failure(reason="r"))
    assert usage.rotate_due(world.service) == 0
    world.clock.advance(world.service.limits.rotation_backoff_s)
    assert usage.rotate_due(world.service) == 1


async def test_the_running_application_begins_due_rotations(world: World) -> None:
    """Nobody has to call: the service's own background work does it."""
    world.model(period_s=60)
    world.active()
    world.clock.advance(60)
    limits = world.service.limits.model_copy(update={"background_interval_s": 0.01})
    service = Service(
        world.service.database, world.service.wrapper, limits, world.clock, world.service.entropy
    )
    app = build_app(service, world.measured)
    async with app.router.lifespan_context(app):
        for _ in range(3000):
            await asyncio.sleep(0.01)
            if newest(world).action == "rotate":
                break
    assert newest(world).detail["reason"] == "period"
