"""Roots under a real Vault: they open for their own record only, survive rotation, and can be shredded."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import permutations

import pytest
from tests.keysvc.vault.conftest import Counted, Place

from anamorph import errors
from anamorph_keysvc.vault.wrapper import BATCH, VaultTransitWrapper
from anamorph_keysvc.wrapper import Context, KeyWrapper, root_context

pytestmark = pytest.mark.real
AT = root_context("acme", "chat", 1)
HOSTILE = (
    "..",
    "../decrypt/other",
    "a/config",
    "%2e%2e",
    "*",
    "+",
    "k\u00e9k",
    "",
    "-a",
    "A",
    "a" * 10_000,
    "a\n",
)


def test_wrapped_root_unwraps(wrapper: VaultTransitWrapper, kek: str) -> None:
    """The KEK is made with the first secret, and no two ciphertexts are alike."""
    assert wrapper.newest(kek) == 0
    wrapped = wrapper.wrap(kek, b"root", AT)
    assert wrapped.startswith(b"vault:v1:")
    assert wrapper.unwrap(kek, wrapped, AT) == b"root"
    assert wrapper.wrap(kek, b"root", AT) != wrapped


def test_protocol_is_kept(wrapper: VaultTransitWrapper) -> None:
    """mypy compares the methods; ``check`` works and makes no KEK."""
    keeper: KeyWrapper = wrapper
    keeper.check()
    assert keeper.production


def test_no_ciphertext_opens_in_another_record(wrapper: VaultTransitWrapper, kek: str) -> None:
    """Moved to another tenant's KEK, tenant, model, version or purpose: every one is refused."""
    records = [
        Context(tenant, model, version, purpose)
        for tenant in ("acme", "globex")
        for model in ("chat", "draw")
        for version in (1, 2)
        for purpose in ("root", "webhook")
    ]
    places = [(f"{kek}-{record.tenant}", record) for record in records]
    wrapped = {place: wrapper.wrap(place[0], b"root", place[1]) for place in places}
    refused = [opens(wrapper, wrapped[source], *target) for source, target in permutations(places, 2)]
    assert len(refused) == 240
    assert not any(refused)
    assert all(opens(wrapper, wrapped[place], *place) for place in places)


def test_record_alone_does_not_open_under_another_kek(wrapper: VaultTransitWrapper, kek: str) -> None:
    """The same context under another tenant's KEK."""
    wrapped = wrapper.wrap(kek, b"root", AT)
    wrapper.wrap(f"{kek}-b", b"root", AT)
    assert not opens(wrapper, wrapped, f"{kek}-b", AT)
    assert not opens(wrapper, wrapped, f"{kek}-none", AT)


@pytest.mark.parametrize(
    "ciphertext",
    [
        b"",
        b"L1" + bytes(60),
        b"vault:v1:",
        b"vault:v0:AAAA",
        b"vault:v1:AA AA",
        b"vault:v1:AAAA\n",
        b"\xff" * 40,
    ],
)
def test_foreign_format_is_refused_without_a_call(
    wrapper: VaultTransitWrapper, counted: Counted, kek: str, ciphertext: bytes
) -> None:
    """A ciphertext of the local wrapper, for example."""
    with pytest.raises(errors.InvalidKey):
        wrapper.unwrap(kek, ciphertext, AT)
    with pytest.raises(errors.InvalidKey):
        wrapper.rewrap(kek, [(ciphertext, AT)])
    assert not counted.seen


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_name_never_reaches_vault(wrapper: VaultTransitWrapper, counted: Counted, name: str) -> None:
    """No method sends it; only a login may have been made before."""
    wrapped = b"vault:v1:AAAA"
    for act in (
        lambda: wrapper.wrap(name, b"root", AT),
        lambda: wrapper.unwrap(name, wrapped, AT),
        lambda: wrapper.rewrap(name, [(wrapped, AT)]),
        lambda: wrapper.newest(name),
        lambda: wrapper.rotate(name),
        lambda: wrapper.shred(name, 2),
    ):
        with pytest.raises(errors.InvalidId):
            act()
    assert {kind for kind, _ in counted.seen} <= {"login", "unwrap", *LOGINS}


LOGINS = ("login_issuer", "login_releaser", "login_shredder")


def test_rewrap_moves_to_the_newest_version(wrapper: VaultTransitWrapper, kek: str) -> None:
    """More than one batch, in order, each under its own context."""
    contexts = [root_context("acme", "chat", version) for version in range(BATCH + 3)]
    olds = [(wrapper.wrap(kek, context.encode(), context), context) for context in contexts]
    assert wrapper.rotate(kek) == wrapper.newest(kek) == 2
    news = wrapper.rewrap(kek, olds)
    assert {wrapper.kek_version(new) for new in news} == {2}
    samples = (0, 1, BATCH - 1, BATCH, BATCH + 2)
    opened = [wrapper.unwrap(kek, news[index], contexts[index]) for index in samples]
    assert opened == [contexts[index].encode() for index in samples]


def test_rewrap_names_what_does_not_open(wrapper: VaultTransitWrapper, kek: str) -> None:
    """One bad row among good ones is pointed out; the others still rewrap without it."""
    good = [(wrapper.wrap(kek, b"root", AT), AT) for _ in range(2)]
    moved = (good[0][0], replace(AT, version=2))
    with pytest.raises(errors.InvalidKey, match=r"1 of 3 .* 1$"):
        wrapper.rewrap(kek, [good[0], moved, good[1]])
    assert len(wrapper.rewrap(kek, good)) == 2
    assert wrapper.rewrap(kek, []) == []


def test_shredding_leaves_survivors_only(wrapper: VaultTransitWrapper, kek: str) -> None:
    """What was not rewrapped never opens again; what was does; doing it again changes nothing."""
    old = wrapper.wrap(kek, b"root", AT)
    newest = wrapper.rotate(kek)
    [survivor] = wrapper.rewrap(kek, [(old, AT)])
    for _ in range(2):
        wrapper.shred(kek, newest)
        assert not opens(wrapper, old, kek, AT)
        assert wrapper.unwrap(kek, survivor, AT) == b"root"
    assert wrapper.kek_version(wrapper.wrap(kek, b"root", AT)) == newest


def test_shredding_is_for_good(wrapper: VaultTransitWrapper, place: Place, kek: str) -> None:
    """Not even Vault's administrator can lower the floor again: the old version is gone."""
    wrapper.wrap(kek, b"root", AT)
    wrapper.shred(kek, wrapper.rotate(kek))
    with place.server.client() as root:
        path = f"anamorph-transit/keys/{kek}"
        answer = root.post(f"{path}/config", json={"min_decryption_version": 1})
        assert answer.status_code == 400
        assert list(root.get(path).json()["data"]["keys"]) == ["2"]


def test_shredding_goes_on_where_it_stopped(wrapper: VaultTransitWrapper, place: Place, kek: str) -> None:
    """Killed between two of its calls, it does the rest when asked again."""
    wrapper.wrap(kek, b"root", AT)
    wrapper.rotate(kek)
    place.server.ask("POST", f"anamorph-transit/keys/{kek}/config", {"min_encryption_version": 2})
    wrapper.shred(kek, 2)
    assert place.server.ask("GET", f"anamorph-transit/keys/{kek}")["data"]["min_available_version"] == 2


@pytest.mark.parametrize("below", [0, 2])
def test_newest_version_is_never_shredded(wrapper: VaultTransitWrapper, kek: str, below: int) -> None:
    """Nothing could be encrypted afterwards."""
    wrapped = wrapper.wrap(kek, b"root", AT)
    with pytest.raises(errors.Conflict):
        wrapper.shred(kek, below)
    assert opens(wrapper, wrapped, kek, AT)


def test_kek_rotates_without_a_failed_unwrap(wrapper: VaultTransitWrapper, kek: str) -> None:
    """While one thread rotates and rewraps, four others open old and new ciphertexts."""
    rows = {version: wrapper.wrap(kek, b"root", replace(AT, version=version)) for version in range(8)}
    ended = threading.Event()

    def release(turn: int) -> int:
        count = 0
        while not ended.is_set() or not count:
            version = (turn + count) % 8
            assert wrapper.unwrap(kek, rows[version], replace(AT, version=version)) == b"root"
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        released = [pool.submit(release, turn) for turn in range(4)]
        try:
            for _ in range(10):
                wrapper.rotate(kek)
                items = [(old, replace(AT, version=version)) for version, old in rows.items()]
                rows.update(enumerate(wrapper.rewrap(kek, items)))
        finally:
            ended.set()
        assert all(future.result() for future in released)
    assert {wrapper.kek_version(row) for row in rows.values()} == {11}


def test_kek_is_derived_and_stays_inside(wrapper: VaultTransitWrapper, place: Place, kek: str) -> None:
    """As Vault describes what was made."""
    wrapper.wrap(kek, b"root", AT)
    made = place.server.ask("GET", f"anamorph-transit/keys/{kek}")["data"]
    assert made.items() >= {"type": "aes256-gcm96", "auto_rotate_period": 720 * 3600}.items()
    assert made["derived"]
    assert not any(made[name] for name in ("exportable", "deletion_allowed", "allow_plaintext_backup"))


def test_underived_kek_is_not_used(wrapper: VaultTransitWrapper, place: Place, kek: str) -> None:
    """Somebody made it before us: every ciphertext under it would open in every record."""
    place.server.ask("POST", f"anamorph-transit/keys/{kek}", {"type": "aes256-gcm96"})
    with pytest.raises(errors.Unavailable, match="derived is False") as refused:
        wrapper.wrap(kek, b"root", AT)
    assert refused.value.code == "kms_denied"
    place.server.ask("POST", f"anamorph-transit/keys/{kek}/config", {"deletion_allowed": True})
    place.server.ask("DELETE", f"anamorph-transit/keys/{kek}")


def test_no_root_in_vaults_logs(wrapper: VaultTransitWrapper, place: Place, kek: str) -> None:
    """A known root, wrapped, opened and rewrapped, is in neither log; that it was done is."""
    canary = os.urandom(32)
    wrapped = wrapper.wrap(kek, canary, AT)
    assert wrapper.unwrap(kek, wrapped, AT) == canary
    wrapper.rotate(kek)
    wrapper.rewrap(kek, [(wrapped, AT)])
    logged = place.server.audit_log.read_bytes()
    assert f"anamorph-transit/decrypt/{kek}".encode() in logged
    logged += place.server.log.read_bytes()
    assert not [form for form in forms(canary) if form in logged]


def forms(secret: bytes) -> list[bytes]:
    import base64

    encoded = [base64.b64encode(secret[skip:])[:-4] for skip in range(3)]
    urlsafe = [base64.urlsafe_b64encode(secret[skip:])[:-4] for skip in range(3)]
    return [secret, secret.hex().encode(), secret.hex().upper().encode(), *encoded, *urlsafe]


def opens(wrapper: VaultTransitWrapper, ciphertext: bytes, kek: str, context: Context) -> bool:
    try:
        wrapper.unwrap(kek, ciphertext, context)
    except errors.InvalidKey:
        return False
    return True
