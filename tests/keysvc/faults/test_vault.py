"""Vault slow, cut off, sealed or restarted: what needs no Vault goes on, the rest waits and resumes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import pytest
from tests.keysvc.faults import outage
from tests.keysvc.faults.calls import ask, until
from tests.keysvc.faults.tokens import living_tokens, revoke_tokens

from anamorph_keysvc.vault.settings import Identity

if TYPE_CHECKING:
    from tests.keysvc.faults.outage import Record
    from tests.keysvc.faults.site import Owner, Site

pytestmark = [pytest.mark.real, pytest.mark.slow]
Fault = Callable[["Site"], AbstractContextManager[None]]


@contextmanager
def latency(site: Site) -> Iterator[None]:
    site.kms.latency(2000)
    yield
    site.kms.heal()


@contextmanager
def resets(site: Site) -> Iterator[None]:
    site.kms.reset_peer()
    yield
    site.kms.heal()


@contextmanager
def answers_lost(site: Site) -> Iterator[None]:
    """Vault acts, and nobody hears of it."""
    site.kms.reset_peer("downstream")
    yield
    site.kms.heal()


@contextmanager
def half_open(site: Site) -> Iterator[None]:
    site.kms.hang()
    yield
    site.kms.heal()


@contextmanager
def silent(site: Site) -> Iterator[None]:
    """Vault acts, and its answers never come."""
    site.kms.hang("downstream")
    yield
    site.kms.heal()


@contextmanager
def refused(site: Site) -> Iterator[None]:
    site.kms.cut()
    yield
    site.kms.heal()


@contextmanager
def sealed(site: Site) -> Iterator[None]:
    site.vault.seal()
    try:
        yield
    finally:
        site.vault.unseal()


@contextmanager
def restarted(site: Site) -> Iterator[None]:
    """Down, up but sealed, and unsealed again; the calls come while it is down."""
    site.vault.stop()
    try:
        yield
    finally:
        site.vault.start()
        site.vault.unseal()


FAULTS: list[Fault] = [latency, resets, answers_lost, half_open, silent, refused, sealed, restarted]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_an_outage_of_vault_is_endured(
    site: Site, owner: Owner, fault: Fault, record_property: Record
) -> None:
    """Rotations are accepted, cached releases and tokens go on, a revoke holds; then all resumes."""
    version = outage.begin(owner, site.first, site.second)
    with fault(site):
        record_property("slowest_call_s", outage.endure(owner, version, site.first, site.second))
    record_property("prepared_after_s", round(outage.recover(owner, version, site.first), 1))


def test_readiness_says_that_vault_is_sealed(site: Site) -> None:
    """Whoever is on call reads what to do; a process that is alive is not restarted for it."""
    with sealed(site):
        said = outage.ready(site.first)
        assert (said.status, said.code) == (503, "kms_sealed")
        assert ask(site.first, "GET", "/livez").status == 200


def test_another_process_takes_over_what_a_dead_one_accepted(
    site: Site, owner: Owner, record_property: Record
) -> None:
    """kill -9 of the process that accepted a rotation while Vault was sealed: the other prepares it."""
    with sealed(site):
        accepted = ask(site.first, "POST", f"{owner.keys_path}:rotate", owner.admin)
        assert accepted.status == 202
        site.kill("first")
    with owner.keys() as keys:
        took = until(lambda: keys.get_version(*owner.at, 1).key_id is not None)
    record_property("prepared_after_s", round(took, 1))
    owner.stage(1)
    owner.activate(1)


def test_revoked_tokens_are_replaced_at_once(site: Site, owner: Owner) -> None:
    """No call fails for it, and each process holds one token per identity again."""
    version = outage.begin(owner, site.first, site.second)
    assert revoke_tokens(site.vault) > 0
    assert owner.release(site.first, version).status == 200
    assert ask(site.second, "POST", f"{owner.keys_path}:rotate", owner.admin).status == 202
    with owner.keys() as keys:
        until(lambda: keys.get_version(*owner.at, version + 1).key_id is not None)
    for process in (site.first, site.second):
        until(lambda: outage.ready(process).status == 200)  # noqa: B023 -- called within the round
    assert living_tokens(site.vault) == {identity.policy: 2 for identity in Identity}


def test_many_calls_at_once_log_in_once(site: Site, owner: Owner) -> None:
    """Also when all of them learn at the same time that the token has died."""
    version = outage.begin(owner, site.first, site.second)
    revoke_tokens(site.vault)
    threads = [threading.Thread(target=owner.release, args=(site.first, version)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert living_tokens(site.vault)["anamorph-releaser"] <= 2


def test_a_lost_secret_id_is_replaced_in_its_file(site: Site, owner: Owner) -> None:
    """It opens once: a process that comes second says that it is not set up, and takes the next by itself."""
    site.kill("first")
    site.configure("first")
    wrapped = (site.production.folder / "first-releaser.wrapped").read_text()
    site.vault.ask("POST", "sys/wrapping/unwrap", headers={"X-Vault-Token": wrapped})
    site.first.start()
    assert outage.ready(site.first).code == "not_ready"
    assert ask(site.first, "GET", "/livez").status == 200
    assert ask(site.first, "GET", owner.keys_path, owner.admin).status == 200
    site.configure("first")
    until(lambda: outage.ready(site.first).status == 200)
