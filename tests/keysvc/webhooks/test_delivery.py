"""Messages reach real receivers: signed, repeated until taken, and none at another's expense."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import update
from sqlmodel import col
from standardwebhooks import Webhook as Library
from tests.keysvc.webhooks.receiver import Authority, Receiver, running_receiver

from anamorph import errors
from anamorph.wire.admin import Event, WebhookSecret
from anamorph_keysvc.scope import WORKER, tenant_scope
from anamorph_keysvc.service import lifecycle, webhooks
from anamorph_keysvc.tables import Webhook
from anamorph_keysvc.webhooks import outbox
from anamorph_keysvc.webhooks.delivery import Deliverer
from anamorph_keysvc.webhooks.sender import Outcome
from anamorph_keysvc.wrapper import LocalWrapper

if TYPE_CHECKING:
    from tests.keysvc.conftest import World
    from tests.keysvc.webhooks.conftest import Hooked

DAY_S = 86400
NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"


def ping(hooked: Hooked, receiver: Receiver, event: Event = Event.ROTATION_STARTED) -> WebhookSecret:
    """A webhook with one event waiting."""
    made = hooked.create(receiver.url(), event)
    hooked.world.rotate()
    return made


def telling(asked: threading.Event, gate: threading.Event | None = None) -> Callable[[Any], None]:
    """An answer that says when it is asked for, and waits for a gate if there is one."""

    def answer(wfile: Any) -> None:
        asked.set()
        if gate is not None:
            gate.wait(10)
        wfile.write(NO_CONTENT)

    return answer


def test_a_message_arrives_once_and_verifies(hooked: Hooked, receiver: Receiver) -> None:
    """By the specification's library, with the secret that was shown at the creation."""
    made = ping(hooked, receiver)
    assert hooked.deliver() == 1
    (got,) = receiver.received
    event = Library(made.secret).verify(got.body, got.headers)
    assert event["type"] == "rotation.started"
    assert event["data"] == {"tenant": "acme", "model": "chat", "version": 1, "state": "PENDING"}
    assert got.headers["webhook-id"] == event["id"]
    (delivery,) = hooked.deliveries(made.id)
    assert (delivery.status, delivery.attempts, delivery.last_status) == ("delivered", 1, 204)
    assert delivery.next_attempt_at is None
    assert hooked.deliver() == 0
    assert len(receiver.received) == 1


def test_events_of_one_webhook_go_out_in_a_row(hooked: Hooked, receiver: Receiver) -> None:
    """A receiver that takes messages does not wait for the next round of the worker."""
    made = hooked.create(receiver.url())
    hooked.world.active()
    assert hooked.deliver() == 1
    assert {delivery.status for delivery in hooked.deliveries(made.id)} == {"delivered"}
    assert len(receiver.received) == 3


def test_a_refused_message_is_repeated_with_one_id_until_taken(hooked: Hooked, receiver: Receiver) -> None:
    """Each attempt is signed anew, since receivers refuse old signatures."""
    receiver.answers = [500, 503, 204]
    made = ping(hooked, receiver)
    for _ in range(3):
        hooked.deliver()
        hooked.world.clock.advance(60)
    assert len({got.headers["webhook-id"] for got in receiver.received}) == 1
    assert len({got.headers["webhook-timestamp"] for got in receiver.received}) == 3
    for got in receiver.received:
        Library(made.secret).verify(got.body, got.headers)
    (delivery,) = hooked.deliveries(made.id)
    assert (delivery.status, delivery.attempts, delivery.last_error) == ("delivered", 3, None)


def test_nothing_is_repeated_before_its_time(hooked: Hooked, receiver: Receiver) -> None:
    """The pause is at least half of five seconds, and as long as the receiver asks."""
    receiver.then, receiver.headers = 429, {"Retry-After": "100"}
    ping(hooked, receiver)
    for _ in range(10):
        hooked.deliver()
        hooked.world.clock.advance(9.9)
    assert len(receiver.received) == 1
    hooked.world.clock.advance(1.1)
    hooked.deliver()
    assert len(receiver.received) == 2


def test_a_message_that_nobody_takes_dies_after_a_day(hooked: Hooked, receiver: Receiver) -> None:
    """With ever longer pauses: some ten attempts, and none afterwards."""
    receiver.then = 500
    made = ping(hooked, receiver)
    start = hooked.world.clock.now
    for _ in range(40):
        (delivery,) = hooked.deliveries(made.id)
        if delivery.next_attempt_at is None:
            break
        hooked.world.clock.now = delivery.next_attempt_at
        hooked.deliver()
    assert (delivery.status, delivery.last_status, delivery.last_error) == (
        "dead",
        500,
        "refused by the receiver",
    )
    assert 10 <= delivery.attempts <= 25
    assert delivery.attempts == len(receiver.received)
    assert hooked.world.clock.now - start <= timedelta(seconds=DAY_S)
    hooked.world.clock.advance(DAY_S)
    assert hooked.deliver() == 0
    assert hooked.webhook(made.id).enabled


@pytest.mark.parametrize("attempts", [1, 2, 5, 20, 500])
@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
def test_pauses_grow_within_bounds(attempts: int, chance: float) -> None:
    """Tripling from five seconds to the longest, by chance down to half; never less than asked."""
    whole = min(14400.0, 5.0 * 3 ** min(attempts - 1, 20))
    assert outbox.pause(attempts, chance, 14400.0, None) == pytest.approx(whole * (0.5 + chance / 2))
    assert outbox.pause(attempts, chance, 14400.0, 9000.0) >= 9000.0
    assert outbox.pause(attempts, chance, 14400.0, 1e9) == 14400.0


def test_410_disables_the_webhook(hooked: Hooked, receiver: Receiver) -> None:
    """What waits for it is dead, what comes is not written, and the audit log says why."""
    made = hooked.create(receiver.url())
    hooked.world.staged()
    receiver.then = 410
    hooked.deliver()
    assert len(receiver.received) == 1
    webhook = hooked.webhook(made.id)
    assert (webhook.enabled, webhook.disabled_reason) == (False, "the receiver answered 410 Gone")
    assert {delivery.status for delivery in hooked.deliveries(made.id)} == {"dead"}
    hooked.world.do(lifecycle.revoke, "acme", "chat", 1, None)
    assert len(hooked.deliveries(made.id)) == 2
    assert hooked.deliver() == 0


@pytest.mark.parametrize("status", [301, 307, 400, 401, 404, 500])
def test_any_other_status_is_tried_again(hooked: Hooked, receiver: Receiver, status: int) -> None:
    """A receiver that is being mended may answer anything; a redirect's goal is never asked."""
    receiver.answers, receiver.headers = [status], {"Location": receiver.url("/elsewhere")}
    made = ping(hooked, receiver)
    hooked.deliver()
    (delivery,) = hooked.deliveries(made.id)
    assert (delivery.status, delivery.last_status) == ("pending", status)
    hooked.world.clock.advance(60)
    hooked.deliver()
    assert [got.path for got in receiver.received] == ["/hook", "/hook"]
    assert hooked.deliveries(made.id)[0].status == "delivered"


def test_a_receiver_that_is_down_is_tried_again(hooked: Hooked, authority: Authority) -> None:
    """It comes back on the same port."""
    with running_receiver(authority.server_file) as receiver:
        made = ping(hooked, receiver)
    hooked.deliver()
    (delivery,) = hooked.deliveries(made.id)
    assert (delivery.status, delivery.last_status, delivery.last_error) == ("pending", None, "no connection")


def test_a_private_address_is_refused_at_each_delivery(
    hooked: Hooked, receiver: Receiver, world: World
) -> None:
    """A name that was public at the creation and leads inside by now."""
    made = ping(hooked, receiver)
    inside = {"127.0.0.1": "169.254.169.254"}
    moved = type(hooked.guard)(lambda *_: [inside["127.0.0.1"]], hooked.guard.allow)
    with Deliverer(moved, hooked.settings) as deliverer:
        deliverer.deliver_due(world.service)
        deliverer.wait()
    assert receiver.received == []
    assert hooked.deliveries(made.id)[0].last_error == "address refused"


def test_a_test_is_sent_once_and_not_repeated(hooked: Hooked, receiver: Receiver) -> None:
    """Whoever tries a receiver out looks at once at what came of it."""
    receiver.then = 500
    made = hooked.create(receiver.url(), Event.KEY_DESTROYED)
    hooked.world.do(webhooks.send_test, "acme", made.id)
    with pytest.raises(errors.Conflict) as caught:
        hooked.world.do(webhooks.send_test, "acme", made.id)
    assert caught.value.code == "test_under_way"
    hooked.deliver()
    (delivery,) = hooked.deliveries(made.id)
    assert (delivery.event, delivery.status, delivery.attempts) == (Event.WEBHOOK_TEST, "dead", 1)
    assert Library(made.secret).verify(receiver.received[0].body, receiver.received[0].headers)["data"] == {
        "tenant": "acme"
    }
    hooked.world.do(webhooks.send_test, "acme", made.id)


def test_a_restart_between_attempts_loses_nothing(
    hooked: Hooked, receiver: Receiver, open_homes: Callable[..., World]
) -> None:
    """Another process goes on where the first was: same id, next attempt."""
    receiver.answers = [500]
    made = ping(hooked, receiver)
    hooked.deliver()
    hooked.deliverer.close()
    hooked.world.service.database.close()
    other = open_homes(hooked.world.home)
    other.clock.now = hooked.world.clock.now + timedelta(seconds=10)
    with Deliverer(hooked.guard, hooked.settings) as deliverer:
        deliverer.deliver_due(other.service)
        deliverer.wait()
    first, second = receiver.received
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    (delivery,) = hooked.deliveries(made.id)
    assert (delivery.status, delivery.attempts) == ("delivered", 2)


def test_a_lease_of_a_dead_process_runs_out(hooked: Hooked, receiver: Receiver) -> None:
    """Until then nobody else sends; afterwards the message is sent, perhaps once more."""
    made = ping(hooked, receiver)
    assert outbox.take(hooked.world.service, "acme", made.id, 90) is not None
    hooked.world.clock.advance(89)
    assert hooked.deliver() == 0
    hooked.world.clock.advance(2)
    assert hooked.deliver() == 1
    assert hooked.deliveries(made.id)[0].status == "delivered"


def test_who_lost_its_lease_changes_nothing(hooked: Hooked, receiver: Receiver) -> None:
    """A process that stood still for minutes does not undo what another has done since."""
    made = ping(hooked, receiver)
    stalled = outbox.take(hooked.world.service, "acme", made.id, 90)
    assert stalled is not None
    hooked.world.clock.advance(91)
    hooked.deliver()
    outbox.settle(hooked.world.service, stalled, Outcome(status=500), hooked.settings)
    outbox.put_back(hooked.world.service, stalled, "not sent")
    (delivery,) = hooked.deliveries(made.id)
    assert (delivery.status, delivery.attempts, delivery.last_error) == ("delivered", 1, None)


def test_one_message_per_webhook_is_under_way(hooked: Hooked, receiver: Receiver) -> None:
    """However many processes look: of eight that take at once, one gets one."""
    made = hooked.create(receiver.url())
    hooked.world.active()
    start, got = threading.Barrier(8), []

    def take() -> None:
        start.wait()
        got.append(outbox.take(hooked.world.service, "acme", made.id, 90))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([parcel for parcel in got if parcel is not None]) == 1


def test_a_slow_receiver_holds_up_neither_others_nor_the_worker(hooked: Hooked, authority: Authority) -> None:
    """Three slow webhooks of one tenant take no more than its share of the threads."""
    hooked.world.model("globex")
    with running_receiver(authority.server_file) as slow, running_receiver(authority.server_file) as quick:
        answered = threading.Event()
        quick.then = telling(answered)
        slow.then = telling(threading.Event(), slow.gate)
        for number in range(3):
            hooked.create(slow.url(f"/{number}"), Event.ROTATION_STARTED)
        hooked.create(quick.url(), Event.ROTATION_STARTED, tenant="globex")
        hooked.world.rotate("acme")
        hooked.world.rotate("globex")
        assert hooked.deliverer.deliver_due(hooked.world.service) == 3
        assert answered.wait(10)
        assert not slow.gate.is_set()
        slow.gate.set()
        hooked.deliverer.wait()
    assert len(slow.received) == 2


def test_no_more_than_the_threads_are_begun(hooked: Hooked, receiver: Receiver, world: World) -> None:
    """What there is no room for stays due."""
    receiver.then = telling(threading.Event(), receiver.gate)
    for _ in range(4):
        hooked.create(receiver.url(), Event.ROTATION_STARTED)
    world.rotate()
    few = hooked.settings.model_copy(update={"threads": 2, "per_tenant": 9})
    with Deliverer(hooked.guard, few) as deliverer:
        assert deliverer.deliver_due(world.service) == 2
        assert deliverer.deliver_due(world.service) == 0
        receiver.gate.set()
        deliverer.wait()
        assert deliverer.deliver_due(world.service) == 2
        deliverer.wait()
    assert len(receiver.received) == 4


class Sealed(LocalWrapper):
    """A wrapper that cannot open anything just now."""

    def unwrap(self, *_: Any) -> bytes:
        raise errors.Unavailable("sealed", code="kms_sealed", retry_after=5)


def test_a_sealed_kms_costs_no_attempt(hooked: Hooked, receiver: Receiver, world: World) -> None:
    """For two days nothing is sent and nothing dies; then it is sent."""
    made = ping(hooked, receiver)
    whole = world.service
    world.service = type(whole)(
        whole.database, Sealed(os.urandom(32)), whole.limits, whole.clock, whole.entropy
    )
    for _ in range(4):
        hooked.deliver()
        world.clock.advance(DAY_S / 2)
    (delivery,) = hooked.deliveries(made.id)
    assert (delivery.status, delivery.attempts, delivery.last_error) == ("pending", 0, "not sent: kms_sealed")
    world.service = whole
    world.clock.now = datetime.now(UTC) + timedelta(days=3)
    hooked.deliver()
    assert hooked.deliveries(made.id)[0].status == "delivered"


def test_a_ciphertext_of_another_webhook_sends_nothing(hooked: Hooked, receiver: Receiver) -> None:
    """Whoever can write to the database cannot have messages signed with a secret that they know."""
    made, other = hooked.create(receiver.url(), Event.ROTATION_STARTED), hooked.create(receiver.url())
    with hooked.world.service.database.write(WORKER) as session:
        known = session.get_one(Webhook, other.id).ciphertext
        session.exec(update(Webhook).where(col(Webhook.id) == made.id).values(ciphertext=known))
    hooked.world.rotate()
    hooked.deliver()
    (delivery,) = hooked.deliveries(made.id)
    assert (delivery.status, delivery.last_error) == ("pending", "not sent: the secret does not open")


def test_a_deleted_webhook_takes_its_messages_along(hooked: Hooked, receiver: Receiver) -> None:
    """Even one that is under way: noting what came of it does no harm."""
    made = ping(hooked, receiver)
    parcel = outbox.take(hooked.world.service, "acme", made.id, 90)
    assert parcel is not None
    with hooked.world.service.work("test", tenant_scope("acme")) as work:
        webhooks.delete(work, "acme", made.id)
    outbox.settle(hooked.world.service, parcel, Outcome(status=410), hooked.settings)
    assert hooked.deliveries(made.id) == []


def test_old_deliveries_are_forgotten_and_waiting_ones_kept(hooked: Hooked, receiver: Receiver) -> None:
    """The list does not grow for ever, and nothing is lost on the way."""
    made = hooked.create(receiver.url(), Event.ROTATION_STARTED, Event.KEY_REVOKED)
    hooked.world.rotate()
    hooked.deliver()
    hooked.world.do(lifecycle.revoke, "acme", "chat", 1, None)
    hooked.deliverer.forget_old(hooked.world.service)
    assert len(hooked.deliveries(made.id)) == 2
    hooked.world.clock.advance(31 * DAY_S)
    hooked.deliverer.forget_old(hooked.world.service)
    (left,) = hooked.deliveries(made.id)
    assert (left.event, left.status) == (Event.KEY_REVOKED, "pending")


def test_a_closed_deliverer_begins_nothing_more(hooked: Hooked, receiver: Receiver) -> None:
    """Closing waits for the attempt under way, and leaves the rest to the next process."""
    made = hooked.create(receiver.url())
    hooked.world.active()
    arrived = threading.Event()
    receiver.then = telling(arrived, receiver.gate)
    hooked.deliverer.deliver_due(hooked.world.service)
    assert arrived.wait(10)
    closing = threading.Thread(target=hooked.deliverer.close)
    closing.start()
    while not hooked.deliverer._stopped.is_set():
        pass
    receiver.gate.set()
    closing.join()
    states = sorted(delivery.status for delivery in hooked.deliveries(made.id))
    assert states == ["delivered", "pending", "pending"]
