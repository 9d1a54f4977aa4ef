"""Sending what waits, in a few threads, so that slow receivers hold up neither each other nor the worker."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self

from anamorph import errors
from anamorph.wire.admin import WebhookEvent
from anamorph_keysvc import deadline
from anamorph_keysvc.service.work import Service
from anamorph_keysvc.webhooks import outbox, signature
from anamorph_keysvc.webhooks.guard import Guard
from anamorph_keysvc.webhooks.outbox import Parcel
from anamorph_keysvc.webhooks.resolver import SystemResolver
from anamorph_keysvc.webhooks.sender import Outcome, Sender
from anamorph_keysvc.webhooks.settings import WebhookSettings
from anamorph_keysvc.wrapper import webhook_context

_log = logging.getLogger(__name__)

# A receiver that takes messages gets so many in a row; one that does not yields at once.
_IN_A_ROW = 10
_UNWRAP_S = 3.0


def public_guard(settings: WebhookSettings) -> Guard:
    """The guard of a running service: the system's name service, and the networks of the settings."""
    return Guard(SystemResolver(), settings.allow_private, settings.refuse)


class Deliverer:
    """Delivers due messages. Per webhook one is under way, per tenant a few, so that none starves another.

    Args:
        guard: decides on each address that is connected to.
        settings: limits of sending.

    Raises:
        SetupError: the file of trusted certificates is not one.
    """

    def __init__(self, guard: Guard, settings: WebhookSettings) -> None:
        self._settings = settings
        self._sender = Sender(guard, ca_file=settings.ca_file, timeout_s=settings.timeout_s)
        self._pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="webhooks")
        self._running: dict[str, tuple[str, Future[None]]] = {}
        self._stopped = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Begin no more attempts, and wait for those under way: as long as one may take."""
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def deliver_due(self, service: Service) -> int:
        """Begin what is due and there is room for, without waiting for it; answers how many webhooks."""
        self._running = {key: value for key, value in self._running.items() if not value[1].done()}
        busy = Counter(tenant for tenant, _ in self._running.values())
        begun = 0
        for tenant, webhook in outbox.waiting(service):
            if len(self._running) >= self._settings.threads:
                break
            if webhook not in self._running and busy[tenant] < self._settings.per_tenant:
                self._running[webhook] = (tenant, self._pool.submit(self._work, service, tenant, webhook))
                busy[tenant] += 1
                begun += 1
        return begun

    def forget_old(self, service: Service) -> None:
        """Delete deliveries that ended long ago."""
        outbox.forget_old(service, self._settings.keep_s)

    def wait(self) -> None:
        """Until everything begun so far has ended."""
        wait([future for _, future in self._running.values()])

    def _work(self, service: Service, tenant: str, webhook: str) -> None:
        try:
            for _ in range(_IN_A_ROW):
                if self._stopped.is_set() or not self._deliver_one(service, tenant, webhook):
                    return
        except errors.Unavailable as error:
            _log.warning("webhooks: %s", error.code)
        except Exception as error:  # noqa: BLE001 -- the lease runs out, and it is tried again
            _log.error("webhooks failed: %s", type(error).__name__)

    def _deliver_one(self, service: Service, tenant: str, webhook: str) -> bool:
        parcel = outbox.take(service, tenant, webhook, self._settings.lease_s)
        if parcel is None:
            return False
        try:
            secret = _secret(service, parcel)
        except errors.Unavailable as error:
            outbox.put_back(service, parcel, f"not sent: {error.code or 'unavailable'}")
            return False
        except errors.InvalidKey:
            outcome = Outcome(error="not sent: the secret does not open")
        else:
            outcome = self._send(service, parcel, secret)
        outbox.settle(service, parcel, outcome, self._settings)
        return outcome.delivered

    def _send(self, service: Service, parcel: Parcel, secret: bytes) -> Outcome:
        body = parcel.payload.encode()
        message = WebhookEvent.model_validate_json(body).id
        return self._sender.post(parcel.url, signature.headers(secret, message, service.clock(), body), body)


def _secret(service: Service, parcel: Parcel) -> bytes:
    with deadline.within(_UNWRAP_S):
        context = webhook_context(parcel.tenant, parcel.webhook)
        return service.wrapper.unwrap(parcel.kek, parcel.ciphertext, context)
