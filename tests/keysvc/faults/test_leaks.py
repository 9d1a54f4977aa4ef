"""Faults, again and again: the processes hold no more threads, sockets, connections and tokens afterwards."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from tests.keysvc.faults.calls import Outcome, ask, until
from tests.keysvc.faults.site import Held, Owner
from tests.keysvc.faults.tokens import living_tokens
from tests.servers.proxies import StatusProxy

from anamorph_keysvc import config as configs
from anamorph_keysvc.vault.auth import Vault
from anamorph_keysvc.vault.settings import Identity
from anamorph_keysvc.vault.wrapper import VaultTransitWrapper
from anamorph_keysvc.wrapper import root_context

if TYPE_CHECKING:
    from tests.keysvc.faults.outage import Record
    from tests.keysvc.faults.site import Site
    from tests.servers.production import KeyServiceProcess

pytestmark = [pytest.mark.real, pytest.mark.slow]
# How often each fault comes; docs/reliability.md has the figures of 5.
ROUNDS = int(os.environ.get("ANAMORPH_LEAK_ROUNDS", "2"))
CALLERS, LATE_MS = 32, 2000
# A thread, a file or a socket that comes and goes; one more for each of the faults would show.
SLACK = 6
STATUSES = (412, 429, 473, 503)
OPERATIONS = 10_000

FAULTS: list[Callable[[Site, StatusProxy], None]] = [
    lambda site, _: site.kms.latency(LATE_MS),
    lambda site, _: site.kms.hang(),
    lambda site, _: site.kms.reset_peer(),
    lambda site, _: site.kms.cut(),
    lambda site, _: site.vault.seal(),
    lambda site, proxy: turn_away(site, proxy),
    lambda site, _: site.database.latency(LATE_MS),
    lambda site, _: site.database.hang(),
    lambda site, _: site.database.reset_peer(),
    lambda site, _: site.database.cut(),
]


@pytest.fixture
def proxy(site: Site) -> Iterator[StatusProxy]:
    """Stands aside until the way to Vault leads to it."""
    vault = site.vault
    with StatusProxy(vault.url, authority=vault.ca_file, certificate=vault.certificate) as running:
        yield running


def turn_away(site: Site, proxy: StatusProxy) -> None:
    """Vault answers each of the statuses for some time, the last of them until the end."""
    proxy.heal()
    for status in STATUSES:
        proxy.inject(status, times=1_000_000 if status == STATUSES[-1] else CALLERS)
    site.kms.lead_to(proxy.port)


def crowd(owner: Owner, version: int) -> list[Outcome]:
    """Calls of many at once, on both processes: those that need Vault, and those that need the database."""

    def call(number: int) -> Outcome:
        processes: list[KeyServiceProcess] = list(owner.site.processes.values())
        process = processes[number % 2]
        if number % 4 < 2:
            return ask(process, "GET", "/readyz")
        return owner.release(process, version)

    with ThreadPoolExecutor(CALLERS) as pool:
        return list(pool.map(call, range(CALLERS)))


def held_after(owner: Owner, version: int) -> Held:
    """What the processes hold after a crowd in which nothing is wrong any more."""
    owner.site.heal()
    processes = owner.site.processes.values()
    until(lambda: all(ask(one, "GET", "/readyz").status == 200 for one in processes))
    assert all(outcome.status == 200 for outcome in crowd(owner, version))
    return owner.site.held()


def warmed_up(owner: Owner, version: int) -> Held:
    """Before any fault: crowds that merely wait a little for both servers, so that pools fill up."""
    for server in (owner.site.kms, owner.site.database):
        server.latency(100)
        assert all(outcome.as_promised for outcome in crowd(owner, version))
    return held_after(owner, version)


@pytest.mark.timeout(1200)
def test_faults_leak_nothing(site: Site, owner: Owner, proxy: StatusProxy, record_property: Record) -> None:
    """Counted before the first fault, with pools that have filled up, and after each round of all of them."""
    version = owner.active()
    seen = [warmed_up(owner, version)]
    for _ in range(ROUNDS):
        for fault in FAULTS:
            fault(site, proxy)
            assert all(outcome.as_promised for outcome in crowd(owner, version))
            after = held_after(owner, version)
        seen.append(after)
    record_property("held", str(seen))
    print(*seen, sep="\n")  # noqa: T201 -- the figures of a long run
    before, last = seen[0], seen[-1]
    assert last.threads <= before.threads + SLACK
    assert last.other_descriptors <= before.other_descriptors + SLACK
    assert last.to_database <= before.to_database + SLACK
    assert last.server_side <= before.server_side + SLACK
    assert last.to_vault <= before.to_vault + SLACK
    assert last.tokens <= before.tokens


def test_ten_thousand_operations_need_one_token_per_identity(site: Site, owner: Owner) -> None:
    """By one process, from many threads, with releases of the service beside them."""
    version = owner.active()
    before = living_tokens(site.vault)
    vault = Vault.open(configs.load(site.production.config("third")).vault)
    wrapper, kek = VaultTransitWrapper(vault), f"kek-{secrets.token_hex(8)}"
    context = root_context(*owner.at, 1)
    wrapped = wrapper.wrap(kek, b"root", context)

    def operate(number: int) -> None:
        if number % 2:
            assert wrapper.unwrap(kek, wrapped, context) == b"root"
        else:
            wrapper.wrap(kek, b"root", context)
        if number % 100 == 0:
            assert owner.release(site.first, version).status == 200

    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(operate, range(OPERATIONS)))
        added = living_tokens(site.vault) - before
    finally:
        vault.close()
    assert set(added) <= {identity.policy for identity in Identity}
    assert max(added.values()) == 1
    assert living_tokens(site.vault) == before
