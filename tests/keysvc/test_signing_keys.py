"""Signing keys of inference tokens: rotated without a token ever being refused, then erased."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jwt
import pytest
from sqlmodel import col, select

from anamorph import errors
from anamorph.wire.admin import Role
from anamorph_keysvc.scope import WORKER
from anamorph_keysvc.service import tokens
from anamorph_keysvc.tables import SigningKey

if TYPE_CHECKING:
    from tests.keysvc.conftest import World


def published(world: World) -> set[str]:
    with world.service.database.read(WORKER) as session:
        return {key.kid for key in tokens.public_keys(session).keys}


def signing(world: World) -> str:
    """The key that a token issued now is signed with."""
    return str(jwt.get_unverified_header(world.inference_token("acme", "chat"))["kid"])


def seeds(world: World) -> set[str]:
    """Keys whose seed is still in the database."""
    with world.service.database.read(WORKER) as session:
        return set(session.exec(select(SigningKey.kid).where(col(SigningKey.ciphertext).is_not(None))))


async def test_a_new_key_is_published_before_it_signs_and_the_old_one_after(world: World) -> None:
    """Engines fetch keys now and then: at every moment they hold the key of every token that lives."""
    world.model()
    limits, first = world.service.limits, signing(world)
    async with world.client(Role.PLATFORM) as platform:
        keys = await platform.rotate_inference_keys()
    (second,) = {key.kid for key in keys.keys} - {first}
    assert signing(world) == first
    world.clock.advance(limits.signing_lead_s)
    assert signing(world) == second
    tokens.renew_signing_keys(world.service)
    assert published(world) == {first, second}
    world.clock.advance(2 * limits.inference_token_ttl_s)
    tokens.renew_signing_keys(world.service)
    assert published(world) == {second}
    assert seeds(world) == {second}
    assert signing(world) == second


async def test_one_key_at_a_time_waits_to_sign(world: World) -> None:
    """Asking again before the new key signs is refused: nothing would be gained by a third."""
    async with world.client(Role.PLATFORM) as platform:
        await platform.rotate_inference_keys()
        with pytest.raises(errors.Conflict):
            await platform.rotate_inference_keys()


def test_a_key_is_replaced_by_itself_after_its_period(world: World) -> None:
    """Nobody has to remember it."""
    world.model()
    first = signing(world)
    world.clock.advance(world.service.limits.signing_period_s)
    for _ in range(3):  # however often the worker looks, one new key
        tokens.renew_signing_keys(world.service)
    (second,) = published(world) - {first}
    world.clock.advance(world.service.limits.signing_lead_s)
    assert signing(world) == second


def test_an_opened_key_signs_on_while_the_kms_is_away(world: World) -> None:
    """Its ciphertext is not needed again by the process that opened it."""
    world.model()
    before = signing(world)
    world.sql("UPDATE signing_key SET ciphertext = ?", b"nonsense")
    assert signing(world) == before
