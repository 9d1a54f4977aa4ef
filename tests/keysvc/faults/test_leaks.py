"""Faults, again and again: the processes hold no more threads, sockets, connections and tokens afterwards."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from tests.keysvc.faults.calls import Outcome, ask, until
from tests.keysvc.faults.site import Owner
from tests.keysvc.faults.tokens import living_tokens

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
ROUNDS, CALLERS = 2, 32
# A thread or a file that comes and goes; one more for each of the faults would show.
SLACK = 6
# Sockets that the pools of a process hold at most, to the database and to Vault.
POOLED, POOLED_VAULT = 16, 32
OPERATIONS = 10_000

FAULTS: list[Callable[[Site], None]] = [
    lambda site: site.kms.hang(),
    lambda site: site.kms.reset_peer(),
    lambda site: site.kms.cut(),
    lambda site: site.database.hang(),
    lambda site: site.database.reset_peer(),
    lambda site: site.database.cut(),
]


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


def suffer(owner: Owner, version: int) -> None:
    """Every fault with a crowd in it, and a crowd without any in the end."""
    site = owner.site
    for fault in FAULTS:
        fault(site)
        assert all(outcome.as_promised for outcome in crowd(owner, version))
        site.heal()
        until(lambda: all(ask(one, "GET", "/readyz").status == 200 for one in site.processes.values()))
    assert all(outcome.status == 200 for outcome in crowd(owner, version))


def test_faults_leak_nothing(site: Site, owner: Owner, record_property: Record) -> None:
    """Counted once every fault has come, with all pools full, and after each has come twice more."""
    version, seen = owner.active(), []
    for _ in range(1 + ROUNDS):
        suffer(owner, version)
        seen.append(site.held())
    record_property("held", str(seen))
    first, last = seen[0], seen[-1]
    assert last.threads <= first.threads + SLACK
    assert last.other_descriptors <= first.other_descriptors + SLACK
    assert last.tokens <= first.tokens
    processes = len(site.processes)
    assert max(last.to_database, last.server_side) <= processes * POOLED + SLACK
    assert last.to_vault <= processes * POOLED_VAULT


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
