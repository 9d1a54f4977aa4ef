"""Deliveries in the database: whose turn it is, who is at one, what came of it.

A delivery is leased by compare-and-set, at most one per webhook at a time, whatever the
number of processes. A lease that runs out, since its process died, is taken again: a
receiver may therefore get a message twice, with the same id.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, or_, update
from sqlmodel import col, func, select

from anamorph.wire.admin import Event
from anamorph_keysvc.scope import WORKER
from anamorph_keysvc.service import lookup
from anamorph_keysvc.service.webhooks import DEAD, DELIVERED, PENDING
from anamorph_keysvc.service.work import Service, Work
from anamorph_keysvc.tables import Delivery, Webhook
from anamorph_keysvc.webhooks.sender import Outcome
from anamorph_keysvc.webhooks.settings import WebhookSettings

ACTOR = "service"
_MOST_WAITING = 500
_FIRST_PAUSE_S = 5.0
_OWN_PAUSE_S = 15.0
_GONE = 410


@dataclass(frozen=True)
class Parcel:
    """A delivery that this process has leased, with all that sending it needs."""

    id: str
    tenant: str
    webhook: str
    url: str
    kek: str
    ciphertext: bytes = field(repr=False)
    event: str
    payload: str
    attempts: int
    created_at: datetime
    leased_until: datetime


def waiting(service: Service) -> list[tuple[str, str]]:
    """Tenant and id of webhooks with a delivery that is due and none under way; longest due first."""
    now = service.clock()
    soonest = func.min(col(Delivery.next_attempt_at))
    leased = func.max(col(Delivery.leased_until))
    statement = (
        select(Delivery.tenant, Delivery.webhook)
        .join(Webhook, col(Webhook.id) == col(Delivery.webhook))
        .where(col(Webhook.enabled), Delivery.status == PENDING, col(Delivery.next_attempt_at) <= now)
        .group_by(col(Delivery.tenant), col(Delivery.webhook))
        .having(or_(leased.is_(None), leased < now))
        .order_by(soonest)
        .limit(_MOST_WAITING)
    )
    with service.database.read(WORKER) as session:
        return [(tenant, webhook) for tenant, webhook in session.exec(statement)]


def take(service: Service, tenant: str, webhook: str, lease_s: float) -> Parcel | None:
    """Lease the delivery of a webhook that is due longest; ``None`` if there is none, or one under way."""
    with service.work(ACTOR, WORKER) as work:
        # The lock makes processes take turns at one webhook.
        row = work.session.get(Webhook, webhook, with_for_update={"key_share": True})
        if row is None or not row.enabled or _under_way(work, webhook):
            return None
        due = work.session.exec(
            select(Delivery)
            .where(
                Delivery.webhook == webhook,
                Delivery.status == PENDING,
                col(Delivery.next_attempt_at) <= work.now,
            )
            .order_by(col(Delivery.next_attempt_at), col(Delivery.id))
            .limit(1)
        ).first()
        until = work.now + timedelta(seconds=lease_s)
        if due is None or not _change(work, due.id, due.leased_until, leased_until=until):
            return None
        return Parcel(
            id=due.id,
            tenant=tenant,
            webhook=webhook,
            url=row.url,
            kek=lookup.tenant(work.session, tenant).kek,
            ciphertext=row.ciphertext,
            event=due.event,
            payload=due.payload,
            attempts=due.attempts,
            created_at=due.created_at,
            leased_until=until,
        )


def _under_way(work: Work, webhook: str) -> bool:
    leased = select(Delivery.id).where(
        Delivery.webhook == webhook, Delivery.status == PENDING, col(Delivery.leased_until) >= work.now
    )
    return work.session.exec(leased.limit(1)).first() is not None


def _change(work: Work, id_: str, lease: datetime | None, **changes: Any) -> bool:
    """Compare-and-set on the lease; ``False`` if it is another's by now."""
    column = col(Delivery.leased_until)
    statement = (
        update(Delivery)
        .where(
            col(Delivery.id) == id_,
            col(Delivery.status) == PENDING,
            column.is_(None) if lease is None else column == lease,
        )
        .values(**changes)
        .execution_options(synchronize_session=False)
    )
    return bool(work.session.exec(statement).rowcount == 1)


def settle(service: Service, parcel: Parcel, outcome: Outcome, settings: WebhookSettings) -> None:
    """Note what came of an attempt: done, again later, or dead."""
    with service.work(ACTOR, WORKER) as work:
        changes: dict[str, Any] = {
            "leased_until": None,
            "attempts": parcel.attempts + 1,
            "last_status": outcome.status,
            "last_error": outcome.error,
        }
        if outcome.delivered:
            changes |= {"status": DELIVERED, "delivered_at": work.now}
        else:
            chance = int.from_bytes(service.entropy(4), "big") / 2**32
            wait = pause(parcel.attempts + 1, chance, settings.longest_pause_s, outcome.retry_after)
            again = work.now + timedelta(seconds=wait)
            last = again > parcel.created_at + timedelta(seconds=settings.give_up_s)
            changes["next_attempt_at"] = again
            changes["status"] = DEAD if last or parcel.event == Event.WEBHOOK_TEST else PENDING
        _change(work, parcel.id, parcel.leased_until, **changes)
    if outcome.status == _GONE:
        disable(service, parcel, "the receiver answered 410 Gone")


def put_back(service: Service, parcel: Parcel, why: str) -> None:
    """End a lease without an attempt, for a reason on our side: that never makes a delivery dead."""
    with service.work(ACTOR, WORKER) as work:
        again = work.now + timedelta(seconds=_OWN_PAUSE_S)
        changes = {"leased_until": None, "next_attempt_at": again, "last_error": why}
        _change(work, parcel.id, parcel.leased_until, **changes)


def disable(service: Service, parcel: Parcel, reason: str) -> None:
    """Send nothing to a webhook any more; what waits for it is dead."""
    with service.work(ACTOR, WORKER) as work:
        row = work.session.get(Webhook, parcel.webhook, with_for_update={"key_share": True})
        if row is None or not row.enabled:
            return
        row.enabled, row.disabled_reason = False, reason
        work.session.add(row)
        work.session.flush()
        work.session.exec(
            update(Delivery)
            .where(col(Delivery.webhook) == parcel.webhook, col(Delivery.status) == PENDING)
            .values(status=DEAD, leased_until=None, last_error="webhook disabled")
            .execution_options(synchronize_session=False)
        )
        work.record(parcel.tenant, "webhook.disable", parcel.webhook, reason=reason)


def pause(attempts: int, chance: float, longest_s: float, asked_s: float | None) -> float:
    """Seconds until the next attempt: tripling from 5, by chance down to half of that, at least as asked.

    Args:
        attempts: made so far, 1 or more.
        chance: from 0 to 1; it spreads the attempts after an outage of a receiver of many.
        longest_s: the longest, whatever a receiver asks for.
        asked_s: what it asked for.
    """
    tripled: float = _FIRST_PAUSE_S * 3 ** min(attempts - 1, 20)
    return min(longest_s, max(min(longest_s, tripled) * (0.5 + chance / 2), asked_s or 0))


def forget_old(service: Service, keep_s: float) -> None:
    """Delete deliveries that ended long ago."""
    with service.work(ACTOR, WORKER) as work:
        oldest = work.now - timedelta(seconds=keep_s)
        statement = delete(Delivery).where(col(Delivery.status) != PENDING, col(Delivery.created_at) < oldest)
        work.session.exec(statement)
