"""The operator as a process: first the lease, then everything else, and the lease again."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import ssl
import threading
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path

import httpx

from anamorph import errors
from anamorph.telemetry import Telemetry, names, setup
from anamorph.telemetry.guard import metric_attributes
from anamorph.wire.keyservice import AsyncKeyService
from anamorph_operator.kubernetes.api import Api, Client, Connection, Count, configuration, connection
from anamorph_operator.kubernetes.catalogue import ENCRYPTED_MODELS, SERVING_CLUSTERS, Resource
from anamorph_operator.kubernetes.clusters import ClusterKeeper
from anamorph_operator.kubernetes.health import Health
from anamorph_operator.kubernetes.lease import Lease
from anamorph_operator.kubernetes.models import ModelKeeper
from anamorph_operator.kubernetes.options import Options, Site
from anamorph_operator.kubernetes.removal import Remover
from anamorph_operator.kubernetes.tokens import token_in
from anamorph_operator.kubernetes.view import View

LEASE = "anamorph-operator"
# A renewal that hangs must leave time for another one before it is given up.
_LEASE_TIMEOUT_S = 2.0


class Driver:
    """Those who decide, with all that they share.

    Args:
        connect: what sends requests to Ray and to what it serves; a new one at each call.
    """

    def __init__(
        self,
        site: Site,
        api: Api,
        keys: AsyncKeyService,
        now: Callable[[], datetime],
        connect: Callable[[], httpx.AsyncBaseTransport],
    ) -> None:
        self.now = now
        self.view = View(site)
        self.clusters = ClusterKeeper(self.view, api, keys, now, connect)
        self.models = ModelKeeper(self.view, api, keys, now)
        self.remover = Remover(self.view, keys)


Operate = Callable[[Driver, Callable[[], Connection], threading.Event], Awaitable[None]]
"""Watches with a driver until the event; ``handlers.operate``."""


def run(site: Site, kubeconfig: Path | None, who: str, operate: Operate) -> None:
    """Hold the lease, then operate until SIGTERM.

    Args:
        site: what the operator was started with.
        kubeconfig: how to reach the API server; the pod's service account if absent.
        who: name of this replica.
        operate: coroutine function of the driver, of what says how to connect, and of what ends it.

    Raises:
        SetupError: the definitions are missing, or no API server is configured.
        ServiceError: the API server does not let the operator do its work.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    options = site.options
    settings = configuration(kubeconfig)
    telemetry = setup("anamorph-operator", otlp_endpoint=options.otlp_endpoint)
    with ExitStack() as stack:
        stack.callback(telemetry.shutdown)
        health = Health(("0.0.0.0", options.port), telemetry)  # noqa: S104 - the kubelet asks it
        stack.callback(health.close)
        unfenced = Client(settings, timeout_s=_LEASE_TIMEOUT_S)
        stack.callback(unfenced.close)
        require_definitions(unfenced, options)
        lease = Lease(unfenced, options.namespace, LEASE, who, os._exit)
        if not lease.acquire(stop):
            return
        lease.keep()
        stack.callback(lease.release)
        fenced = Client(settings, lease.fence, count=counting(telemetry))
        stack.callback(fenced.close)
        asyncio.run(_operate(site, fenced, health, lambda: connection(settings), stop, operate))


def require_definitions(client: Client, options: Options) -> None:
    """See that our resources are known to the API server.

    Raises:
        SetupError: they are not.
    """
    for resource in (ENCRYPTED_MODELS, SERVING_CLUSTERS):
        try:
            client.list(resource, options.compute_namespace)
        except errors.NotFound:
            raise errors.SetupError(
                f"the API server does not know {resource}: anamorph-operator crds | "
                "kubectl apply --server-side -f -"
            ) from None
        except (errors.Unavailable, errors.TooManyRequests):
            logging.getLogger(__name__).warning("the API server does not answer yet")


def counting(telemetry: Telemetry) -> Count:
    """Counts what the operator asks of the API server, but for what kopf watches."""
    counter = telemetry.meter.create_counter(names.OPERATOR_CALLS, "{call}")

    def count(verb: str, resource: Resource, status: int) -> None:
        attributes = {names.METHOD: verb, names.KIND: resource.plural, names.STATUS_CODE: status}
        counter.add(1, metric_attributes(attributes))

    return count


async def _operate(
    site: Site,
    client: Client,
    health: Health,
    connect: Callable[[], Connection],
    stop: threading.Event,
    operate: Operate,
) -> None:
    async with AsyncExitStack() as stack:
        keys = await stack.enter_async_context(key_service(site.options))
        believed = trusted(site.options)
        driver = Driver(site, Api(client), keys, _utc_now, lambda: httpx.AsyncHTTPTransport(verify=believed))
        beating = asyncio.create_task(health.beat(), name="heartbeat")
        try:
            await operate(driver, connect, stop)
        finally:
            stop.set()  # a thread of kopf's waits for it
            beating.cancel()
            with suppress(asyncio.CancelledError):
                await beating


def key_service(options: Options) -> AsyncKeyService:
    """The key service, by the operator's projected token."""
    transport = httpx.AsyncHTTPTransport(verify=trusted(options))
    token = token_in(options.keysvc_token_file, "mount the operator's projected token there")
    return AsyncKeyService(options.keysvc, token, transport=transport)


def _utc_now() -> datetime:
    return datetime.now(UTC)


def trusted(options: Options) -> ssl.SSLContext | bool:
    """Whose certificates are believed."""
    return True if options.ca_file is None else ssl.create_default_context(cafile=str(options.ca_file))
