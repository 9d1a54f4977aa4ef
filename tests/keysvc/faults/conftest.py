"""One production service for this folder, on servers of its own: tokens outlive killed processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from tests.keysvc.faults import invariants
from tests.keysvc.faults.site import Owner, Site
from tests.servers.postgres import running_postgres
from tests.servers.production import running_production
from tests.servers.vault import running_vault

if TYPE_CHECKING:
    from tests.servers.postgres import PostgresServer
    from tests.servers.proxies import Toxiproxy
    from tests.servers.vault import VaultServer


@pytest.fixture(scope="package")
def durable_postgres() -> Iterator[PostgresServer]:
    """What it has acknowledged is on disk."""
    with running_postgres(durable=True) as server:
        yield server


@pytest.fixture(scope="package")
def faulty_vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VaultServer]:
    with running_vault(tmp_path_factory.mktemp("faulty-vault")) as server:
        yield server


@pytest.fixture(scope="package")
def whole_site(
    durable_postgres: PostgresServer,
    faulty_vault: VaultServer,
    toxiproxy: Toxiproxy,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    """Two processes that run; a test that kills one starts it again."""
    folder = tmp_path_factory.mktemp("site")
    with (
        running_production(folder, durable_postgres, faulty_vault) as production,
        toxiproxy.proxy(durable_postgres.port) as database,
        toxiproxy.proxy(faulty_vault.port) as kms,
    ):
        site = Site(production, database, kms)
        try:
            site.start("first")
            site.start("second")
            yield site
        finally:
            site.heal()
            for process in production.started:
                process.program.stop()


@pytest.fixture
def site(whole_site: Site) -> Iterator[Site]:
    """The site, healed afterwards; every invariant holds then."""
    yield whole_site
    whole_site.heal()
    for name, process in whole_site.processes.items():
        if not process.program.running:
            whole_site.start(name)
    invariants.check(whole_site.production)


@pytest.fixture
def owner(site: Site) -> Owner:
    return site.owner()
