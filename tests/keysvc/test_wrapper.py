"""The local wrapper, and that a ciphertext opens in its own record only."""

from __future__ import annotations

import base64
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anamorph import errors
from anamorph.wire.admin import Role
from anamorph_keysvc.homes import Home
from anamorph_keysvc.wrapper import Context, LocalWrapper, root_context

if TYPE_CHECKING:
    from tests.keysvc.conftest import World

WRAPPER = LocalWrapper(bytes(32))
KEK = "t-0"
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
contexts = st.builds(Context, texts, texts, st.integers(0, 999), texts)


@given(secret=st.binary(max_size=64), context=contexts)
def test_what_is_wrapped_unwraps_under_its_context(secret: bytes, context: Context) -> None:
    """Any secret, any context, and never the same ciphertext twice."""
    wrapped = WRAPPER.wrap(KEK, secret, context)
    assert WRAPPER.unwrap(KEK, wrapped, context) == secret
    assert WRAPPER.wrap(KEK, secret, context) != wrapped


@given(one=contexts, other=contexts)
def test_no_ciphertext_opens_under_another_context(one: Context, other: Context) -> None:
    """Contexts that differ anywhere are told apart, wherever the parts are cut."""
    wrapped = WRAPPER.wrap(KEK, b"root", one)
    if one != other:
        assert one.encode() != other.encode()
        with pytest.raises(errors.InvalidKey):
            WRAPPER.unwrap(KEK, wrapped, other)


def test_parts_of_a_context_cannot_be_shifted_into_each_other() -> None:
    """``a|bc`` is not ``ab|c``: each part carries its length."""
    assert Context("a", "bc", 1, "root").encode() != Context("ab", "c", 1, "root").encode()


@given(position=st.integers(0, 61), flip=st.integers(1, 255))
def test_an_altered_ciphertext_does_not_open(position: int, flip: int) -> None:
    """One byte anywhere, format mark and nonce included."""
    wrapped = bytearray(WRAPPER.wrap(KEK, bytes(32), root_context("acme", "chat", 1)))
    wrapped[position] ^= flip
    with pytest.raises(errors.InvalidKey):
        WRAPPER.unwrap(KEK, bytes(wrapped), root_context("acme", "chat", 1))


@pytest.mark.parametrize("ciphertext", [b"", b"L1", b"L1short", b"L3" + bytes(60)])
def test_what_is_no_ciphertext_is_refused_like_a_forged_one(ciphertext: bytes) -> None:
    """One error for every forgery."""
    with pytest.raises(errors.InvalidKey):
        WRAPPER.unwrap(KEK, ciphertext, root_context("acme", "chat", 1))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (("acme", "chat", 1), ("acme", "chat", 2)),
        (("acme", "chat", 1), ("acme", "draw", 1)),
        (("acme", "chat", 1), ("globex", "chat", 1)),
    ],
)
async def test_a_ciphertext_moved_to_another_row_releases_nothing(
    world: World, source: tuple[str, str, int], target: tuple[str, str, int]
) -> None:
    """Between versions, models and tenants: refused, as a failure of the service, not of the caller."""
    for tenant, model in (("acme", "chat"), ("acme", "draw"), ("globex", "chat")):
        world.model(tenant, model)
        world.active(tenant, model)
    world.active()
    move = (
        "UPDATE key_version SET row_version = row_version + 1, ciphertext ="
        " (SELECT ciphertext FROM key_version"
        " WHERE (tenant, model, version) = (?, ?, ?)) WHERE (tenant, model, version) = (?, ?, ?)"
    )
    world.sql(move, *source, *target)
    with pytest.raises(errors.InvalidKey):
        world.release_to_client(*target)
    async with world.client(Role.CLIENT, target[0]) as client:
        with pytest.raises(errors.ServiceError) as refused:
            await client.release(*target, "client")
    assert type(refused.value) is errors.ServiceError


def test_a_root_that_is_not_the_records_own_is_not_released(world: World) -> None:
    """Even a properly wrapped root is checked against the record's key id."""
    world.model()
    version = world.active()
    foreign = world.service.wrapper.wrap(world.kek(), bytes(32), root_context("acme", "chat", version))
    world.sql("UPDATE key_version SET row_version = row_version + 1, ciphertext = ?", foreign)
    with pytest.raises(errors.KeyMismatch):
        world.release_to_client("acme", "chat", version)


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_no_secret_is_anywhere_but_in_its_answer(
    home: Home,
    open_homes: Callable[..., World],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Known roots, subkeys, API keys and grants are not in database, log of writes, or logs, in any form."""
    caplog.set_level("DEBUG")
    numbers = count(1)

    def canary(size: int) -> bytes:
        return next(numbers).to_bytes(2, "big").rjust(size, b"\xc5")

    world = open_homes(home, canary)
    world.model()
    version = world.active()
    secrets = {"root canary": b"\xc5" * 24}
    async with world.client(Role.CLIENT) as client:
        released = await client.release("acme", "chat", version, "client")
    secrets["subkey"] = released.material()
    with pytest.raises(errors.Conflict):
        world.grant(version)
    for role in (Role.CLIENT, Role.PLATFORM):
        secrets[role.value] = world.secret(role).encode()
    secrets["grant"] = world.grant(world.rotate()).encode()
    secrets["token"] = world.inference_token("acme", "chat").encode()
    out, err = capfd.readouterr()
    places = {
        path.name: path.read_bytes() for path in world.home.path.iterdir() if path.name.startswith("keysvc")
    }
    assert "keysvc.db-wal" in places
    places["log"] = (caplog.text + out + err).encode()
    for place, content in places.items():
        for name, secret in secrets.items():
            for form in forms(secret):
                assert form not in content, f"{name} in {place}"
    assert b"acme.chat.v1." in places["keysvc.db-wal"]  # what should be there is found this way


def forms(secret: bytes) -> list[bytes]:
    """Raw, hexadecimal, and base64 at each alignment that a longer text could give it."""
    encoded = [base64.b64encode(secret[skip:])[:-4] for skip in range(3)]
    urlsafe = [base64.urlsafe_b64encode(secret[skip:])[:-4] for skip in range(3)]
    return [secret, secret.hex().encode(), secret.hex().upper().encode(), *encoded, *urlsafe]
