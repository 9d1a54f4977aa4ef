"""Webhooks of a tenant, and the events that wait to be sent to them.

An event is written in the transaction of the transition that it tells of: there is
neither an event without its transition nor a transition without its event.
"""

from __future__ import annotations

from sqlmodel import Session, col, select

from anamorph import errors
from anamorph.wire.admin import (
    DeliveryRead,
    Event,
    EventSubject,
    WebhookCreate,
    WebhookEvent,
    WebhookRead,
    WebhookSecret,
)
from anamorph.wire.states import State
from anamorph_keysvc.credentials import Caller
from anamorph_keysvc.service import lookup, quotas
from anamorph_keysvc.service.work import Service, Work, found
from anamorph_keysvc.tables import Delivery, KeyVersion, Webhook
from anamorph_keysvc.webhooks import signature
from anamorph_keysvc.webhooks.guard import Guard, parse
from anamorph_keysvc.wrapper import webhook_context

PENDING, DELIVERED, DEAD = "pending", "delivered", "dead"

_TOLD: dict[State, Event] = {
    State.PENDING: Event.ROTATION_STARTED,
    State.STAGED: Event.ROTATION_STAGED,
    State.ACTIVE: Event.ROTATION_ACTIVATED,
    State.FAILED: Event.ROTATION_FAILED,
    State.DRAINING: Event.KEY_DRAINING,
    State.RETIRED: Event.KEY_RETIRED,
    State.SUSPENDED: Event.KEY_SUSPENDED,
    State.COMPROMISED: Event.KEY_REVOKED,
    State.DESTROY_SCHEDULED: Event.KEY_DESTROY_SCHEDULED,
    State.DESTROYED: Event.KEY_DESTROYED,
}


def event_of(origin: State | None, to: State) -> Event | None:
    """What a transition is told as; ``origin`` is absent for a new version. Materialising is not told."""
    if origin is State.SUSPENDED and to in {State.ACTIVE, State.DRAINING}:
        return Event.KEY_RESUMED
    if origin is State.DESTROY_SCHEDULED and to is State.RETIRED:
        return Event.KEY_RESTORED
    return _TOLD.get(to)


def enqueue(work: Work, row: KeyVersion, event: Event | None) -> None:
    """Write an event for each of the tenant's webhooks that asked for it, in this transaction."""
    if event is None:
        return
    wanted = select(Webhook).where(Webhook.tenant == row.tenant, col(Webhook.enabled))
    listening = [webhook for webhook in work.session.exec(wanted) if event in webhook.events]
    if not listening:
        return
    subject = EventSubject(
        tenant=row.tenant, model=row.model, version=row.version, key_id=row.key_id, state=row.state
    )
    told = _told(work, event, subject)
    for webhook in listening:
        _add(work, webhook, told)


def _told(work: Work, event: Event, subject: EventSubject) -> WebhookEvent:
    return WebhookEvent(id=work.fresh_id("evt"), type=event, timestamp=work.now, data=subject)


def _add(work: Work, webhook: Webhook, told: WebhookEvent) -> Delivery:
    delivery = Delivery(
        id=work.fresh_id("dlv"),
        tenant=webhook.tenant,
        webhook=webhook.id,
        event=told.type.value,
        payload=told.model_dump_json(exclude_none=True),
        status=PENDING,
        created_at=work.now,
        next_attempt_at=work.now,
    )
    work.session.add(delivery)
    work.session.flush()
    return delivery


def create(service: Service, caller: Caller, tenant: str, body: WebhookCreate, guard: Guard) -> WebhookSecret:
    """Create a webhook; its secret is in this answer and nowhere else in clear.

    Raises:
        Unprocessable: the URL is refused, or its host does not resolve.
        Conflict: over the quota.
    """
    with service.database.read(caller.scope) as session:
        kek = lookup.tenant(session, tenant).kek
    guard.check(body.url)
    id_, secret = f"whk_{service.entropy(12).hex()}", service.entropy(signature.SECRET_BYTES)
    ciphertext = service.wrapper.wrap(kek, secret, webhook_context(tenant, id_))
    with service.work(caller.actor, caller.scope) as work:
        row = Webhook(
            id=id_,
            tenant=tenant,
            url=body.url,
            events=[event.value for event in dict.fromkeys(body.events)],
            ciphertext=ciphertext,
            kek_version=service.wrapper.kek_version(ciphertext),
            created_at=work.now,
        )
        work.session.add(row)
        work.session.flush()
        # The host only: the rest of a URL may hold a secret of the receiver's.
        work.record(tenant, "webhook.create", id_, host=parse(body.url).host)
        quotas.check(work, tenant, "webhooks")
        return WebhookSecret(**webhook_read(row).model_dump(), secret=signature.shown(secret))


def webhook(session: Session, tenant: str, id_: str) -> Webhook:
    """A webhook of this tenant, or NotFound; in a write transaction locked until it ends."""
    # Not against those who refer to it: events are written while one is being sent.
    locks = {"key_share": True} if session.info.get("locks") else None
    row = session.get(Webhook, id_, with_for_update=locks)
    return found(row if row is not None and row.tenant == tenant else None, "webhook")


def delete(work: Work, tenant: str, id_: str) -> WebhookRead:
    """Delete a webhook, with all that was to be sent to it."""
    row = webhook(work.session, tenant, id_)
    answer = webhook_read(row)
    work.session.delete(row)
    work.session.flush()
    work.record(tenant, "webhook.delete", id_)
    return answer


def send_test(work: Work, tenant: str, id_: str) -> DeliveryRead:
    """Send an event of the type ``webhook.test``, once: it is not repeated when it fails.

    Raises:
        Conflict: the webhook is disabled, or a test is under way.
    """
    row = webhook(work.session, tenant, id_)
    if not row.enabled:
        raise errors.Conflict(
            f"this webhook is disabled ({row.disabled_reason}): create another", code="webhook_disabled"
        )
    waiting = select(Delivery).where(
        Delivery.tenant == tenant,
        Delivery.webhook == id_,
        Delivery.event == Event.WEBHOOK_TEST.value,
        Delivery.status == PENDING,
    )
    if work.session.exec(waiting).first() is not None:
        raise errors.Conflict("a test of this webhook is under way", code="test_under_way", retry_after=5)
    made = delivery_read(_add(work, row, _told(work, Event.WEBHOOK_TEST, EventSubject(tenant=tenant))))
    work.record(tenant, "webhook.test", id_)
    return made


def webhook_read(row: Webhook) -> WebhookRead:
    """Message of a webhook, without its secret."""
    return WebhookRead.model_validate(row.model_dump(exclude={"ciphertext", "kek_version"}))


def delivery_read(row: Delivery) -> DeliveryRead:
    """Message of a delivery. The next attempt shows only while there is one."""
    fields = row.model_dump(exclude={"payload", "leased_until"})
    if row.status != PENDING:
        fields["next_attempt_at"] = None
    return DeliveryRead.model_validate(fields)
