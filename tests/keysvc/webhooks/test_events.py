"""Which transitions are told, and that an event and its transition are one change."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from sqlmodel import col, select

from anamorph import errors
from anamorph.wire.admin import Activation, Event, Failure
from anamorph.wire.states import TRANSITIONS, State
from anamorph_keysvc.scope import PLATFORM
from anamorph_keysvc.service import lifecycle, materialization, webhooks
from anamorph_keysvc.service.work import Work
from anamorph_keysvc.tables import Delivery, KeyVersion, Webhook
from anamorph_keysvc.webhooks.signature import shown
from anamorph_keysvc.wrapper import webhook_context

if TYPE_CHECKING:
    from tests.keysvc.webhooks.conftest import Hooked

URL = "https://receiver.test/hook"
AT = ("acme", "chat")


def told(hooked: Hooked, webhook: str) -> list[str]:
    return [delivery.event.value for delivery in hooked.deliveries(webhook)]


def payloads(hooked: Hooked, webhook: str) -> list[dict[str, Any]]:
    statement = select(Delivery.payload).where(Delivery.webhook == webhook).order_by(col(Delivery.id))
    with hooked.world.service.database.read(PLATFORM) as session:
        return [json.loads(payload) for payload in session.exec(statement)]


def test_every_transition_is_told_but_materialising() -> None:
    """No transition is forgotten; what a receiver can do nothing about is not told."""
    silent = {
        (origin, to)
        for origin, goals in TRANSITIONS.items()
        for to in goals
        if webhooks.event_of(origin, to) is None
    }
    assert silent == {(State.PENDING, State.MATERIALIZING)}
    named = {webhooks.event_of(origin, to) for origin, goals in TRANSITIONS.items() for to in goals}
    assert named | {webhooks.event_of(None, State.PENDING), Event.WEBHOOK_TEST, None} == {*Event, None}


def test_a_rotation_is_told_from_start_to_end(hooked: Hooked) -> None:
    """In order, with what changed, and nothing but metadata."""
    webhook = hooked.create(URL).id
    first, second = hooked.world.active(), hooked.world.active()
    hooked.world.clock.advance(100)
    hooked.world.do(lifecycle.retire, *AT, first, None)
    hooked.world.do(lifecycle.destroy, *AT, first, None)
    hooked.world.do(lifecycle.restore, *AT, first, None)
    hooked.world.do(lifecycle.suspend, *AT, second, None)
    hooked.world.do(lifecycle.resume, *AT, second, None)
    hooked.world.do(lifecycle.revoke, *AT, second, None)
    expected = "rotation.started rotation.staged rotation.activated rotation.started rotation.staged"
    expected += " key.draining rotation.activated key.retired key.destroy_scheduled key.restored"
    expected += " key.suspended key.resumed key.revoked"
    assert sorted(told(hooked, webhook)) == sorted(expected.split())
    bodies = payloads(hooked, webhook)
    assert {key for body in bodies for key in body} == {"id", "type", "timestamp", "data"}
    fields = {key for body in bodies for key in body["data"]}
    assert fields == {"tenant", "model", "version", "key_id", "state"}
    activated = [body for body in bodies if body["type"] == "rotation.activated"]
    assert {(body["data"]["version"], body["data"]["state"]) for body in activated} == {
        (first, "ACTIVE"),
        (second, "ACTIVE"),
    }


def test_a_failure_and_a_destruction_are_told(hooked: Hooked) -> None:
    """The end of a version that never served."""
    webhook = hooked.create(URL, Event.ROTATION_FAILED, Event.KEY_DESTROYED).id
    version = hooked.world.rotate()
    hooked.world.do(materialization.fail, None, *AT, version, Failure(reason="r"))
    hooked.world.do(lifecycle.destroy, *AT, version, None)
    hooked.world.clock.advance(1000)
    hooked.world.do(lifecycle.destroyed, *AT, version, None)
    assert told(hooked, webhook) == ["rotation.failed", "key.destroyed"]


def test_only_what_was_asked_for_is_told(hooked: Hooked) -> None:
    """Per webhook; the same event has one id for all of them."""
    staged, everything = hooked.create(URL, Event.ROTATION_STAGED).id, hooked.create(URL).id
    hooked.world.staged()
    assert told(hooked, staged) == ["rotation.staged"]
    assert sorted(told(hooked, everything)) == ["rotation.staged", "rotation.started"]
    ids = {body["id"] for body in payloads(hooked, everything) if body["type"] == "rotation.staged"}
    assert ids == {payloads(hooked, staged)[0]["id"]}


def test_another_tenant_hears_nothing(hooked: Hooked) -> None:
    """A webhook is its tenant's."""
    hooked.world.model("globex")
    webhook = hooked.create(URL, tenant="globex").id
    hooked.world.active("acme")
    assert told(hooked, webhook) == []


def test_a_transition_that_is_undone_is_not_told(hooked: Hooked) -> None:
    """The event is in the transition's transaction."""
    webhook = hooked.create(URL, Event.ROTATION_ACTIVATED).id
    version = hooked.world.staged()

    def activate_and_fail(work: Work) -> None:
        lifecycle.activate(work, *AT, version, None, Activation(endpoint="http://engine"))
        assert work.session.exec(select(Delivery)).all()
        raise errors.Unavailable("the database went away")

    with pytest.raises(errors.Unavailable):
        hooked.world.do(activate_and_fail)
    assert told(hooked, webhook) == []
    with hooked.world.service.database.read(PLATFORM) as session:
        assert session.get_one(KeyVersion, (*AT, version)).state is State.STAGED


def test_a_secret_is_stored_wrapped_for_its_webhook_only(hooked: Hooked) -> None:
    """The database holds no secret in clear, and no ciphertext opens for another webhook."""
    made, other = hooked.create(URL), hooked.create(URL)
    with hooked.world.service.database.read(PLATFORM) as session:
        row = session.get_one(Webhook, made.id)
    kek, wrapper = hooked.world.kek(), hooked.world.service.wrapper
    secret = wrapper.unwrap(kek, row.ciphertext, webhook_context("acme", made.id))
    assert shown(secret) == made.secret != other.secret
    with pytest.raises(errors.InvalidKey):
        wrapper.unwrap(kek, row.ciphertext, webhook_context("acme", other.id))
    assert made.secret not in repr(made)
