"""One token per identity: cached, renewed in time, replaced when it dies, never read from elsewhere."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from anamorph import errors
from anamorph_keysvc import deadline
from anamorph_keysvc.vault.auth import Caller, Vault
from anamorph_keysvc.vault.settings import Identity
from anamorph_keysvc.vault.wrapper import VaultTransitWrapper
from anamorph_keysvc.wrapper import root_context

if TYPE_CHECKING:
    from tests.keysvc.vault.conftest import Clock, Counted, Place

pytestmark = pytest.mark.real
AT = root_context("acme", "chat", 1)
ROLE_S = 3600  # the TTL that ``setup`` gives tokens by default


@pytest.fixture
def aging(place: Place, counted: Counted, clock: Clock) -> VaultTransitWrapper:
    """Its clock stands still until a test moves it; Vault's own goes on."""
    return VaultTransitWrapper(place.open(counted, clock))


def policies_of_living_tokens(place: Place) -> Counter[str]:
    """Of every token that an AppRole login made and that lives, whose it is."""
    accessors = place.server.ask("LIST", "auth/token/accessors")["data"]["keys"]
    found: Counter[str] = Counter()
    for accessor in accessors:
        token = place.server.ask("POST", "auth/token/lookup-accessor", {"accessor": accessor})["data"]
        found.update(token["policies"] if token["path"] == "auth/approle/login" else [])
    return found


def test_one_token_per_identity(
    wrapper: VaultTransitWrapper, place: Place, counted: Counted, kek: str
) -> None:
    """However many threads ask however often, none logs in twice; closing leaves no token behind."""
    before = policies_of_living_tokens(place)
    wrapped = wrapper.wrap(kek, b"root", AT)
    wrapper.check()
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(lambda _: wrapper.unwrap(kek, wrapped, AT), range(400)))
    assert set(opened) == {b"root"}
    made = policies_of_living_tokens(place) - before
    assert made == Counter(identity.policy for identity in Identity)
    assert [counted.of(f"login_{identity}") for identity in Identity] == [1, 1, 1]
    place.close()
    assert policies_of_living_tokens(place) == before


def test_first_login_is_made_by_one_thread(place: Place, counted: Counted) -> None:
    """All that start at once wait for it."""
    vault, start = place.open(counted), threading.Barrier(16)

    def ready(_: int) -> None:
        start.wait()
        vault.releaser.ready()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ready, range(16)))
    assert counted.of("login_releaser") == 1


def test_renewed_at_two_thirds(
    aging: VaultTransitWrapper, place: Place, counted: Counted, clock: Clock
) -> None:
    """Not before; once; with the same token afterwards."""
    aging.check()
    before = policies_of_living_tokens(place)
    clock.now += ROLE_S * 2 / 3 - 1
    aging.check()
    assert counted.of("renew_issuer") == 0
    clock.now += 2
    aging.check()
    aging.check()
    assert counted.seen["renew_issuer", "ok"] == 1
    assert counted.of("login_issuer") == 1
    assert policies_of_living_tokens(place) == before


def test_renewed_by_the_worker(place: Place, counted: Counted, clock: Clock) -> None:
    """``renew_due`` renews what is held and due, and logs nobody in."""
    vault = place.open(counted, clock)
    vault.renew_due()
    vault.issuer.ready()
    clock.now += ROLE_S * 0.7
    vault.renew_due()
    vault.renew_due()
    assert counted.of("renew_issuer") == 1
    assert counted.of("login_releaser") == 0


def test_login_anew_at_its_end(aging: VaultTransitWrapper, counted: Counted, clock: Clock) -> None:
    """A token that nobody renewed for long."""
    aging.check()
    clock.now += ROLE_S + 1
    aging.check()
    assert counted.of("login_issuer") == 2


def test_login_anew_near_the_greatest_age(place: Place, counted: Counted, clock: Clock) -> None:
    """Vault renews for less and less: a new token in good time, and the old one is revoked."""
    role = f"auth/approle/role/{Identity.SHREDDER.policy}"
    place.server.ask("POST", role, {"token_ttl": 8, "token_max_ttl": 8})
    try:
        vault = place.open(counted, clock)
        old = held_by(vault.shredder)
        # Vault's own clock has to come past the middle of the token's life.
        while place.server.ask("POST", "auth/token/lookup", {"token": old})["data"]["ttl"] > 2:
            threading.Event().wait(0.1)
        clock.now += 6
        vault.renew_due()
        assert counted.seen["renew_shredder", "ok"] == 1
        assert held_by(vault.shredder) != old
        with place.server.client(old) as client:
            assert client.get("auth/token/lookup-self").status_code == 403
    finally:
        place.server.ask("POST", role, {"token_ttl": ROLE_S, "token_max_ttl": 86400})


def held_by(caller: Caller) -> str:
    caller.ready()
    assert caller._held is not None
    return caller._held.granted.token


def revoke(place: Place, vault: Vault) -> None:
    for caller in vault.callers:
        if caller._held is not None:
            place.server.ask("POST", "auth/token/revoke", {"token": caller._held.granted.token})


def test_revoked_token_is_replaced_in_the_same_call(
    wrapper: VaultTransitWrapper, vault: Vault, place: Place, counted: Counted, kek: str
) -> None:
    """Nobody notices, sixteen threads at once included; one login is enough."""
    wrapped = wrapper.wrap(kek, b"root", AT)
    wrapper.unwrap(kek, wrapped, AT)
    revoke(place, vault)
    with ThreadPoolExecutor(16) as pool:
        opened = set(pool.map(lambda _: wrapper.unwrap(kek, wrapped, AT), range(16)))
    assert opened == {b"root"}
    assert counted.of("login_releaser") == 2


def test_revoked_before_its_renewal(
    aging: VaultTransitWrapper, place: Place, counted: Counted, clock: Clock
) -> None:
    """Vault refuses to renew it: a new login."""
    aging.check()
    revoke(place, place.opened[-1])
    clock.now += ROLE_S * 0.7
    place.opened[-1].renew_due()
    assert counted.seen["renew_issuer", "refused_403"] == 1
    assert counted.of("login_issuer") == 2
    aging.check()


def test_renewal_that_fails_leaves_the_token(place: Place, counted: Counted, clock: Clock) -> None:
    """While Vault is sealed nothing is lost, and it is asked again only after a while."""
    vault = place.open(counted, clock)
    vault.issuer.ready()
    place.server.seal()
    try:
        clock.now += ROLE_S * 0.7
        vault.renew_due()
        vault.renew_due()
    finally:
        place.server.unseal()
    assert counted.of("renew") == 1
    clock.now += 6
    vault.renew_due()
    assert counted.seen["renew_issuer", "ok"] == 1
    assert counted.of("login_issuer") == 1


def test_policy_that_refuses_is_no_dead_token(vault: Vault, counted: Counted) -> None:
    """A 403 that a new token would get as well is answered, without a login."""
    wrapper = VaultTransitWrapper(vault)
    with pytest.raises(errors.Unavailable) as refused:
        wrapper.rotate("anamorph-audit")
    assert refused.value.code == "kms_denied"
    assert counted.of("login_issuer") == 1


def test_wrapped_secret_id_is_opened_once(place: Place, counted: Counted, clock: Clock) -> None:
    """It stays in memory: later logins need no file's new content, and nobody else can open it."""
    vault = place.open(counted, clock)
    vault.issuer.ready()
    clock.now += ROLE_S + 1
    vault.issuer.ready()
    assert counted.of("login_issuer") == 2
    assert counted.of("unwrap") == 2  # what is it, and open it
    token = place.secret_file(Identity.ISSUER).read_text().strip()
    with place.server.client(token) as client:
        assert client.post("sys/wrapping/unwrap").status_code == 400


def test_secret_id_that_somebody_opened_is_reported(place: Place) -> None:
    """Loudly, and without the token in the message."""
    vault = place.open()
    token = place.secret_file(Identity.ISSUER).read_text().strip()
    with place.server.client(token) as thief:
        assert thief.post("sys/wrapping/unwrap").status_code == 200
    for _ in range(2):
        with pytest.raises(errors.SetupError, match="somebody else holds it") as found:
            vault.issuer.ready()
        assert token not in str(found.value)
    place.wrap_secret_id(Identity.ISSUER)
    vault.issuer.ready()


def test_token_that_wraps_something_else_is_not_opened(place: Place) -> None:
    """Somebody put the secret id of another role, or another secret, where ours should be."""
    vault = place.open()
    other = place.wrap_secret_id(Identity.RELEASER)
    place.secret_file(Identity.ISSUER).write_text(other)
    with pytest.raises(errors.SetupError, match="wraps something else"):
        vault.issuer.ready()
    vault.releaser.ready()


def test_new_secret_id_is_used_when_the_old_is_gone(place: Place, counted: Counted, clock: Clock) -> None:
    """Destroyed at Vault: logins are denied until a new wrapped one is written."""
    vault = place.open(counted, clock)
    vault.issuer.ready()
    path = f"auth/approle/role/{Identity.ISSUER.policy}/secret-id"
    for accessor in place.server.ask("LIST", path)["data"]["keys"]:
        place.server.ask("POST", f"{path}-accessor/destroy", {"secret_id_accessor": accessor})
    clock.now += ROLE_S + 1
    with pytest.raises(errors.Unavailable) as denied:
        vault.issuer.ready()
    assert denied.value.code == "kms_denied"
    place.wrap_secret_id(Identity.ISSUER)
    vault.issuer.ready()


@pytest.mark.parametrize("content", [None, "", "two words", "\u00e9"])
def test_file_without_a_token(place: Place, content: str | None) -> None:
    """The message names the file."""
    vault, file = place.open(), place.secret_file(Identity.ISSUER)
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(errors.SetupError, match=str(file)):
        vault.issuer.ready()


def test_static_token_for_development(place: Place, tmp_path: Path) -> None:
    """It is used, and not revoked at the end: it is not ours."""
    made = place.server.ask("POST", "auth/token/create", {"policies": ["anamorph-issuer"], "ttl": "5m"})
    token, file = made["auth"]["client_token"], tmp_path / "token"
    file.write_text(token)
    vault = place.open(production=False, issuer={"method": "token", "token_file": file})
    vault.issuer.ready()
    place.close()
    with place.server.client(token) as client:
        assert client.get("auth/token/lookup-self").status_code == 200
    place.server.ask("POST", "auth/token/revoke", {"token": token})


def test_tokens_of_the_environment_are_not_used(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither VAULT_TOKEN nor ~/.vault-token nor ~/.netrc gets a call through."""
    monkeypatch.setenv("VAULT_TOKEN", place.server.root_token)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".vault-token").write_text(place.server.root_token)
    (tmp_path / ".netrc").write_text(f"machine 127.0.0.1 login x password {place.server.root_token}")
    vault = place.open()
    with pytest.raises(errors.Unavailable):
        VaultTransitWrapper(vault).rotate("anamorph-audit")


def test_login_counts_against_the_callers_deadline(place: Place, counted: Counted) -> None:
    """No time left: nothing is asked."""
    vault = place.open(counted)
    with deadline.within(1e-9), pytest.raises(errors.Unavailable) as late:
        vault.issuer.ready()
    assert late.value.code == "timeout"
    assert not counted.of("login")


def test_no_secret_in_what_is_shown(vault: Vault, token_of: Callable[[Identity], str]) -> None:
    """Neither repr nor exceptions show a token."""
    token = token_of(Identity.ISSUER)
    shown: list[Any] = [vault, vault.issuer, vault.issuer._held, vault.transport, vault.settings]
    assert not [each for each in shown if token in repr(each)]
