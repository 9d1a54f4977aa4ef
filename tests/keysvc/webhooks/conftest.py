"""Receivers for webhooks, a guard that admits them, and a key service that sends to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_network
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlmodel import col, select
from tests.keysvc.webhooks.receiver import NAME, Authority, Receiver, make_authority, running_receiver

from anamorph.wire.admin import DeliveryRead, Event, Role, WebhookCreate, WebhookRead, WebhookSecret
from anamorph_keysvc.credentials import Caller
from anamorph_keysvc.scope import PLATFORM
from anamorph_keysvc.service import webhooks
from anamorph_keysvc.tables import Delivery, Webhook
from anamorph_keysvc.webhooks.delivery import Deliverer
from anamorph_keysvc.webhooks.guard import Guard
from anamorph_keysvc.webhooks.sender import Sender
from anamorph_keysvc.webhooks.settings import WebhookSettings

if TYPE_CHECKING:
    from tests.keysvc.conftest import World

LOOPBACK = (ip_network("127.0.0.0/8"),)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("authority"), NAME)


@pytest.fixture
def receiver(authority: Authority) -> Iterator[Receiver]:
    with running_receiver(authority.server_file) as running:
        yield running


@pytest.fixture
def guard() -> Guard:
    """Admits loopback, which every name leads to."""
    return Guard(lambda *_: ["127.0.0.1"], allow=LOOPBACK)


@pytest.fixture
def sender(guard: Guard, authority: Authority) -> Sender:
    return Sender(guard, ca_file=authority.ca_file, timeout_s=5)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Authority:
    """A CA that nobody trusts."""
    return make_authority(tmp_path, NAME)


@dataclass
class Hooked:
    """A world whose webhooks may point at loopback, and what delivers for it."""

    world: World
    guard: Guard
    settings: WebhookSettings
    deliverer: Deliverer

    def create(self, url: str, *events: Event, tenant: str = "acme") -> WebhookSecret:
        body = WebhookCreate(url=url, events=events) if events else WebhookCreate(url=url)
        return webhooks.create(self.world.service, admin_of(tenant), tenant, body, self.guard)

    def deliver(self) -> int:
        """Everything that is due now, to the end."""
        begun = self.deliverer.deliver_due(self.world.service)
        self.deliverer.wait()
        return begun

    def deliveries(self, webhook: str) -> list[DeliveryRead]:
        statement = select(Delivery).where(Delivery.webhook == webhook).order_by(col(Delivery.id))
        with self.world.service.database.read(PLATFORM) as session:
            return [webhooks.delivery_read(row) for row in session.exec(statement)]

    def webhook(self, id_: str) -> WebhookRead:
        with self.world.service.database.read(PLATFORM) as session:
            return webhooks.webhook_read(session.get_one(Webhook, id_))


def admin_of(tenant: str) -> Caller:
    return Caller("key:admin", Role.ADMIN, tenant)


@pytest.fixture
def settings(authority: Authority) -> WebhookSettings:
    return WebhookSettings(allow_private=LOOPBACK, ca_file=authority.ca_file, timeout_s=5)


@pytest.fixture
def hooked(world: World, guard: Guard, settings: WebhookSettings) -> Iterator[Hooked]:
    """One tenant with one model, and the time of the real world, by which receivers judge signatures."""
    world.clock.now = datetime.now(UTC)
    world.app.state.webhook_guard = guard
    world.model()
    with Deliverer(guard, settings) as deliverer:
        yield Hooked(world, guard, settings, deliverer)
