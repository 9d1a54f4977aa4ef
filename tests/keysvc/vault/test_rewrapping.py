"""Rows follow KEKs that rotate: whoever's they are, and past what does not open."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from sqlmodel import select
from tests.servers.proxies import StatusProxy

from anamorph.wire.admin import Role, WebhookCreate
from anamorph_keysvc.credentials import Caller
from anamorph_keysvc.scope import WORKER
from anamorph_keysvc.service import rewrapping, webhooks
from anamorph_keysvc.service.rewrapping import Rewrapper
from anamorph_keysvc.tables import SigningKey
from anamorph_keysvc.vault.wrapper import VaultTransitWrapper
from anamorph_keysvc.webhooks.guard import Guard
from anamorph_keysvc.worker import Job, Worker
from anamorph_keysvc.wrapper import PLATFORM_KEK, signing_context, webhook_context

if TYPE_CHECKING:
    from tests.keysvc.conftest import World
    from tests.keysvc.vault.conftest import OnVault, Place

pytestmark = pytest.mark.real
TENANTS = ("acme", "globex", "initech")
FOLLOWED = {tenant: [2, 2] for tenant in TENANTS}
BAD = b"vault:v1:" + b"QUJD" * 20


@pytest.fixture
def world(world: World, on_vault: OnVault) -> World:
    return on_vault(world)


@pytest.fixture
def three(world: World, wrapper: VaultTransitWrapper) -> World:
    """Tenants with two versions each, all under an old version of their KEKs."""
    for tenant in TENANTS:
        world.model(tenant)
        world.active(tenant), world.staged(tenant)
        wrapper.rotate(world.kek(tenant))
    return world


def versions(world: World) -> dict[str, list[int]]:
    """Under which version of its KEK each of a tenant's roots lies."""
    rows = world.sql("SELECT tenant, kek_version FROM key_version ORDER BY tenant, version")
    return {tenant: [version for of, version in rows if of == tenant] for tenant in TENANTS}


def put(world: World, ciphertext: bytes) -> bytes:
    """Put a ciphertext into globex's first version; what was there."""
    at = "WHERE tenant = 'globex' AND version = 1"
    before: bytes = world.sql(f"SELECT ciphertext FROM key_version {at}")[0][0]
    world.sql(f"UPDATE key_version SET row_version = row_version + 1, ciphertext = ? {at}", ciphertext)
    return before


def outcomes(world: World, rewrapper: Rewrapper, rounds: int) -> list[str]:
    """As the worker's metric counts them."""
    seen: list[str] = []
    worker = Worker(world.service, (Job("rewrap", rewrapper.go_on),), lambda _, outcome: seen.append(outcome))
    for _ in range(rounds):
        worker.round()
    return seen


@pytest.mark.parametrize("bad", [BAD, b"not even Vault's"], ids=["closed", "foreign"])
def test_a_row_that_does_not_open_keeps_no_other_from_its_turn(
    three: World, bad: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither other tenants' nor its own tenant's; it is named in the log and counted until repaired."""
    good = put(three, bad)
    rewrapper = Rewrapper()
    assert outcomes(three, rewrapper, 2) == ["InvalidKey", "InvalidKey"]
    assert versions(three) == {"acme": [2, 2], "globex": [1, 2], "initech": [2, 2]}
    assert "rewrapping for tenant globex: 1 wrapped keys do not open" in caplog.text
    assert "chat/keys/1" in caplog.text
    assert "chat/keys/2" not in caplog.text
    assert bad.decode() not in caplog.text
    put(three, good)
    assert outcomes(three, rewrapper, 1) == ["ok"]
    assert versions(three) == FOLLOWED
    three.release_to_client("globex", "chat", 1)


def test_a_failure_is_counted_in_every_round_until_a_turn_has_passed_without_it(
    three: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With so many tenants that a turn takes many rounds, an alert on a share of rounds still sees it."""
    monkeypatch.setattr(rewrapping, "_TENANTS", 1)
    rewrapper = Rewrapper()
    good = put(three, BAD)
    turn = ["ok", "ok", *["InvalidKey"] * 3]  # platform, each tenant, and nobody left
    assert outcomes(three, rewrapper, 5) == turn
    assert versions(three) == {"acme": [2, 2], "globex": [1, 2], "initech": [2, 2]}
    put(three, good)
    assert outcomes(three, rewrapper, 10) == ["InvalidKey"] * 4 + ["ok"] * 6
    assert versions(three) == FOLLOWED


def test_a_tenant_whose_kek_does_not_answer_is_passed_by_once_it_had_a_round(
    three: World, place: Place
) -> None:
    """An outage of one KEK ends rounds, not the turn; afterwards that tenant follows as well."""
    server, rewrapper = place.server, Rewrapper()
    with StatusProxy(server.url, authority=server.ca_file, certificate=server.certificate) as proxy:
        vault = place.open(address=proxy.url)
        world = replace(three, service=replace(three.service, wrapper=VaultTransitWrapper(vault)))
        proxy.inject(500, times=1000, part=f"/{three.kek('globex')}")
        assert outcomes(world, rewrapper, 3) == ["kms_unavailable", "kms_unavailable", "ok"]
        assert versions(three) == {"acme": [2, 2], "globex": [1, 1], "initech": [2, 2]}
        proxy.heal()
        assert outcomes(world, rewrapper, 1) == ["ok"]
        vault.close()
    assert versions(three) == FOLLOWED


def test_a_tenant_that_has_only_a_webhook_follows(world: World, wrapper: VaultTransitWrapper) -> None:
    """Its secret is under the KEK as roots are, and opens as before."""
    world.model("acme")
    guard = Guard(lambda *_: ["93.184.216.34"])
    body, caller = WebhookCreate(url="https://hooks.example/x"), Caller("key:admin", Role.ADMIN, "acme")
    made = webhooks.create(world.service, caller, "acme", body, guard)
    before = secret_of(world, wrapper, made.id)
    wrapper.rotate(world.kek())
    assert Rewrapper().go_on(world.service) == 1
    assert world.sql("SELECT kek_version FROM webhook") == [(2,)]
    assert secret_of(world, wrapper, made.id) == before
    assert Rewrapper().go_on(world.service) == 0


def secret_of(world: World, wrapper: VaultTransitWrapper, webhook: str) -> bytes:
    with world.service.database.read(WORKER) as session:
        row = webhooks.webhook(session, "acme", webhook)
    return wrapper.unwrap(world.kek(), row.ciphertext, webhook_context("acme", webhook))


def test_the_platforms_signing_keys_follow(world: World, wrapper: VaultTransitWrapper) -> None:
    """They lie under a KEK of their own, which rotates by itself like the others."""
    newest = wrapper.rotate(PLATFORM_KEK)
    before = signing_key(world)
    assert Rewrapper().go_on(world.service) == 1
    after = signing_key(world)
    assert wrapper.kek_version(before.ciphertext or b"") < newest
    assert wrapper.kek_version(after.ciphertext or b"") == newest
    assert seed_of(wrapper, after) == seed_of(wrapper, before)
    assert Rewrapper().go_on(world.service) == 0


def signing_key(world: World) -> SigningKey:
    with world.service.database.read(WORKER) as session:
        return session.exec(select(SigningKey)).one()


def seed_of(wrapper: VaultTransitWrapper, row: SigningKey) -> bytes:
    return wrapper.unwrap(PLATFORM_KEK, row.ciphertext or b"", signing_context(row.kid))
