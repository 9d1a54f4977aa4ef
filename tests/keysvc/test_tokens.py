"""Inference tokens: what engines will find in them, and how they verify them offline."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jwt
import pytest

from anamorph import errors
from anamorph.wire.admin import InferenceTokenRead, JwkSet, Role

if TYPE_CHECKING:
    from tests.keysvc.conftest import World


def verified(token: InferenceTokenRead, keys: JwkSet) -> dict[str, object]:
    """The claims, as an engine reads them with nothing but the public keys."""
    kid = jwt.get_unverified_header(token.token)["kid"]
    (key,) = [key for key in keys.keys if key.kid == kid]
    claims: dict[str, object] = jwt.decode(
        token.token,
        jwt.PyJWK(key.model_dump() | {"alg": "EdDSA"}),
        algorithms=["EdDSA"],
        audience="inference",
        issuer="anamorph",
        # The service's clock stands still in these tests; its times are compared below.
        options={"require": ["exp", "iat", "sub"], "verify_iat": False},
    )
    return claims


@pytest.mark.parametrize(("role", "subject"), [(Role.CLIENT, "key:"), (Role.PLATFORM, "operator")])
async def test_a_token_verifies_offline_and_says_for_whom_it_is(
    world: World, role: Role, subject: str
) -> None:
    """Tenant, model, subject and at most 15 minutes, signed with a published key."""
    world.model()
    async with world.client(role) as client:
        token = await client.inference_token("acme", "chat")
        claims = verified(token, await client.inference_keys())
    assert (claims["tenant"], claims["model"]) == ("acme", "chat")
    assert str(claims["sub"]).startswith(subject)
    assert 0 < int(str(claims["exp"])) - int(str(claims["iat"])) <= 900
    assert token.expires_at.timestamp() == claims["exp"]


async def test_the_baselines_token_names_the_plaintext_tenant(world: World) -> None:
    """The platform may measure the unprotected baseline, whose tenant has no rows."""
    async with world.client(Role.PLATFORM) as platform:
        claims = verified(
            await platform.inference_token("plaintext", "chat"), await platform.inference_keys()
        )
    assert claims["tenant"] == "plaintext"


async def test_there_are_no_tokens_for_models_that_do_not_exist(world: World) -> None:
    """An unknown model is not found."""
    world.model()
    async with world.client(Role.CLIENT) as client:
        with pytest.raises(errors.NotFound):
            await client.inference_token("acme", "other")
