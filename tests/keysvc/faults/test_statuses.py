"""Vault answers "not now": for a moment nobody notices, for longer it is an outage like any other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from tests.keysvc.faults import outage
from tests.keysvc.faults.site import LIMITS
from tests.servers.proxies import StatusProxy

if TYPE_CHECKING:
    from tests.keysvc.faults.outage import Record
    from tests.keysvc.faults.site import Owner, Site
    from tests.servers.production import KeyServiceProcess

pytestmark = [pytest.mark.real, pytest.mark.slow]
STATUSES = [412, 429, 473, 503]


@pytest.fixture(scope="module")
def proxy(whole_site: Site) -> Iterator[StatusProxy]:
    vault = whole_site.vault
    with StatusProxy(vault.url, authority=vault.ca_file, certificate=vault.certificate) as running:
        yield running


@pytest.fixture(scope="module")
def third(whole_site: Site, proxy: StatusProxy) -> Iterator[KeyServiceProcess]:
    """A process whose Vault is behind the proxy of statuses."""
    port = whole_site.database.port
    process = whole_site.production.process("third", postgres_port=port, vault_url=proxy.url, limits=LIMITS)
    yield process
    process.program.stop()


@pytest.mark.parametrize("status", STATUSES)
def test_a_status_for_long_is_endured(
    site: Site,
    owner: Owner,
    third: KeyServiceProcess,
    proxy: StatusProxy,
    status: int,
    record_property: Record,
) -> None:
    """As any outage; the other processes have none of Vault meanwhile, so that none of them helps out."""
    version = outage.begin(owner, third, site.second)
    site.kms.cut()
    proxy.inject(status, times=1_000_000)
    record_property("slowest_call_s", outage.endure(owner, version, third, site.second))
    proxy.heal()
    site.kms.heal()
    record_property("prepared_after_s", round(outage.recover(owner, version, third), 1))


@pytest.mark.parametrize("status", STATUSES)
def test_a_status_for_a_moment_is_not_noticed(
    site: Site, owner: Owner, third: KeyServiceProcess, proxy: StatusProxy, status: int
) -> None:
    """Opening a root is repeated until Vault takes it, within the deadline."""
    version = outage.begin(owner, third, site.second)
    proxy.inject(status, times=3, part="/decrypt/")
    assert owner.release(third, version).status == 200
    injected = [arrival.injected for arrival in proxy.arrived if "/decrypt/" in arrival.path]
    assert injected[-4:] == [True, True, True, False]
    proxy.heal()
