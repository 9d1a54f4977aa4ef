"""Webhooks of a tenant, and what was sent to them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request
from sqlmodel import col, select

from anamorph.wire.admin import DeliveryRead, Page, WebhookCreate, WebhookRead, WebhookSecret
from anamorph_keysvc.deps import Admin, Do, TenantId, TheService
from anamorph_keysvc.pages import DEFAULT_SIZE, PageSize, PageToken, page_of
from anamorph_keysvc.service import lookup, webhooks
from anamorph_keysvc.tables import Delivery, Webhook
from anamorph_keysvc.webhooks.guard import Guard

router = APIRouter(prefix="/v1/tenants/{tenant}/webhooks", tags=["webhooks"])

WebhookId = Annotated[str, Path(max_length=64, pattern=r"^[a-z0-9_]+$")]


async def _guard(request: Request) -> Guard:
    guard: Guard = request.app.state.webhook_guard
    return guard


TheGuard = Annotated[Guard, Depends(_guard)]


@router.post("", status_code=201)
def create_webhook(
    caller: Admin, tenant: TenantId, body: WebhookCreate, service: TheService, guard: TheGuard, do: Do
) -> WebhookSecret:
    """Create a webhook; the answer is the only one that shows its secret. Takes no Idempotency-Key."""
    do.refuse_key()
    return webhooks.create(service, caller, tenant, body, guard)


@router.get("")
def list_webhooks(
    caller: Admin,
    tenant: TenantId,
    service: TheService,
    page: PageToken = None,
    limit: PageSize = DEFAULT_SIZE,
) -> Page[WebhookRead]:
    """A tenant's webhooks, without their secrets."""
    with service.database.read(caller.scope) as session:
        lookup.tenant(session, tenant)
        mine = select(Webhook).where(Webhook.tenant == tenant)
        return page_of(session, mine, (col(Webhook.id),), webhooks.webhook_read, page, limit)


@router.get("/{webhook:id}")
def get_webhook(caller: Admin, tenant: TenantId, webhook: WebhookId, service: TheService) -> WebhookRead:
    """One webhook."""
    with service.database.read(caller.scope) as session:
        return webhooks.webhook_read(webhooks.webhook(session, tenant, webhook))


@router.delete("/{webhook:id}")
def delete_webhook(_: Admin, tenant: TenantId, webhook: WebhookId, do: Do) -> WebhookRead:
    """Delete a webhook, with all that was to be sent to it."""
    return do(WebhookRead, lambda work: webhooks.delete(work, tenant, webhook))


@router.post("/{webhook:id}:test", status_code=202)
def send_test_event(_: Admin, tenant: TenantId, webhook: WebhookId, do: Do) -> DeliveryRead:
    """Send an event of the type ``webhook.test``, once; the list of deliveries says what came of it."""
    return do(DeliveryRead, lambda work: webhooks.send_test(work, tenant, webhook))


@router.get("/{webhook:id}/deliveries")
def list_deliveries(
    caller: Admin,
    tenant: TenantId,
    webhook: WebhookId,
    service: TheService,
    page: PageToken = None,
    limit: PageSize = DEFAULT_SIZE,
) -> Page[DeliveryRead]:
    """What was and is to be sent to a webhook, oldest first."""
    with service.database.read(caller.scope) as session:
        webhooks.webhook(session, tenant, webhook)
        mine = select(Delivery).where(Delivery.tenant == tenant, Delivery.webhook == webhook)
        return page_of(session, mine, (col(Delivery.id),), webhooks.delivery_read, page, limit)
