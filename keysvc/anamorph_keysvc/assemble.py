"""The service put together: embedded on one machine, or with PostgreSQL and Vault.

Both are the same service; only database, wrapper and signer differ.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

from anamorph import errors
from anamorph.telemetry import Telemetry
from anamorph_keysvc import checkpoints, homes, roles, schema
from anamorph_keysvc.checkpoints import CheckpointSigner, LocalSigner
from anamorph_keysvc.config import AuditSettings, ServiceConfig
from anamorph_keysvc.credentials import tenant_exists
from anamorph_keysvc.database import Database, translated
from anamorph_keysvc.homes import Home
from anamorph_keysvc.identity.bearer import Identity, open_identity
from anamorph_keysvc.identity.settings import IdentitySettings
from anamorph_keysvc.observe import Observer, build_observer
from anamorph_keysvc.scope import WORKER
from anamorph_keysvc.service import tokens
from anamorph_keysvc.service.rewrapping import Rewrapper
from anamorph_keysvc.service.work import Service, utc_now
from anamorph_keysvc.vault.auth import Vault
from anamorph_keysvc.vault.signer import VaultSigner
from anamorph_keysvc.vault.wrapper import VaultTransitWrapper
from anamorph_keysvc.webhooks.delivery import Deliverer, public_guard
from anamorph_keysvc.webhooks.guard import Guard
from anamorph_keysvc.webhooks.settings import WebhookSettings
from anamorph_keysvc.worker import JOBS, Job
from anamorph_keysvc.wrapper import check_private

UPGRADE = "anamorph-keysvc database upgrade"


@dataclass(frozen=True)
class Assembly:
    """What an application is built from."""

    service: Service
    identity: Identity
    observer: Observer
    jobs: tuple[Job, ...]
    webhook_guard: Guard


@contextmanager
def embedded(home: Home, telemetry: Telemetry, *, production: bool = False) -> Iterator[Assembly]:
    """The service of one machine; its home must be held (``Home.locked``).

    Raises:
        SetupError: not initialised, open to others, of another release, or not fit for production.
    """
    with ExitStack() as ends:
        service = homes.open_service(home, production=production, clock=utc_now, entropy=os.urandom)
        ends.callback(service.database.close)
        signer = LocalSigner.open(home.path / checkpoints.FILE_NAME, os.urandom)
        audit = AuditSettings(destination=str(home.path / "checkpoints"))
        yield _assembled(
            ends,
            service,
            build_observer(telemetry, service.database, checkpoints=True),
            IdentitySettings(),
            WebhookSettings(),
            _checkpoint_job(signer, audit),
        )


@contextmanager
def production(config: ServiceConfig, telemetry: Telemetry) -> Iterator[Assembly]:
    """A process of the production service; as many as one likes may run.

    Raises:
        SetupError: the configuration does not fit, or the database is of another release.
        Unavailable: the database does not answer.
    """
    with ExitStack() as ends:
        database = open_database(config)
        ends.callback(database.close)
        _check(database)
        observer = build_observer(telemetry, database, checkpoints=config.audit.destination is not None)
        vault = Vault.open(config.vault, observer, tracer=telemetry.tracer)
        ends.callback(vault.close)
        service = Service(database, VaultTransitWrapper(vault), config.limits, utc_now, os.urandom)
        jobs = _checkpoint_job(VaultSigner(vault), config.audit)
        service.woken.set()  # the first round at once: logins and opened keys outlast what comes
        more = (
            Job("log-in", lambda _service: vault.hold()),
            Job("renew-tokens", lambda _service: vault.renew_due()),
            Job("rewrap", Rewrapper().go_on, 60),
        )
        yield _assembled(ends, service, observer, config.identity, config.webhooks, (*jobs, *more))


def _check(database: Database) -> None:
    with translated():
        roles.check(database.engine)
        schema.check(database.engine, remedy=UPGRADE)


def open_database(config: ServiceConfig) -> Database:
    """The database of a configuration."""
    return Database.postgresql(config.database, pool_size=config.pool_size)


def initialise(config: ServiceConfig, clock: Callable[[], datetime]) -> None:
    """Make the platform's API key and the first signing key where they are missing.

    Raises:
        SetupError: the database is not upgraded, or the key file is open to others.
        Unavailable: database or Vault does not answer.
    """
    with ExitStack() as ends:
        database = open_database(config)
        ends.callback(database.close)
        _check(database)
        vault = Vault.open(config.vault)
        ends.callback(vault.close)
        service = Service(database, VaultTransitWrapper(vault), config.limits, clock, os.urandom)
        homes.create_platform_key(config.platform_key_file, os.urandom)
        tokens.ensure_signing_key(service)
        homes.register_platform_key(service, config.platform_key_file)


def checkpoint_keys(place: Home | ServiceConfig) -> dict[int, bytes]:
    """Public keys of audit checkpoints by version, raw Ed25519.

    Raises:
        SetupError: the home's key file is missing or open to others.
        Unavailable: Vault does not answer.
    """
    if isinstance(place, Home):
        path = place.path / checkpoints.FILE_NAME
        check_private(path)
        return LocalSigner.open(path, os.urandom).public_keys()
    with ExitStack() as ends:
        vault = Vault.open(place.vault)
        ends.callback(vault.close)
        return VaultSigner(vault).public_keys()


def _assembled(
    ends: ExitStack,
    service: Service,
    observer: Observer,
    identity: IdentitySettings,
    webhooks: WebhookSettings,
    more: tuple[Job, ...],
) -> Assembly:
    who = open_identity(identity, partial(tenant_exists, service.database))
    ends.callback(who.close)
    who.check()
    guard = public_guard(webhooks)
    deliverer = ends.enter_context(Deliverer(guard, webhooks))
    delivery = (
        Job("webhooks", deliverer.deliver_due),
        Job("forget-deliveries", deliverer.forget_old, 600),
    )
    return Assembly(service, who, observer, (*JOBS, *delivery, *more), webhook_guard=guard)


def _checkpoint_job(signer: CheckpointSigner, audit: AuditSettings) -> tuple[Job, ...]:
    destination = audit.destination
    if destination is None:
        return ()

    def act(service: Service) -> None:
        done = checkpoints.checkpoint_all(
            lambda: service.database.read(WORKER),
            lambda: service.database.write(WORKER),
            signer,
            destination,
            service.clock,
            interval=timedelta(seconds=audit.interval_s),
        )
        if done.alarms:
            raise errors.AuditRefused("; ".join(done.alarms))
        if done.unavailable:
            raise errors.Unavailable(done.unavailable, code="checkpoints_unavailable")

    return (Job("checkpoints", act, min(30.0, audit.interval_s)),)
