"""One door for all credentials: each is verified by exactly one part, and refusals are all alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from anamorph import errors
from anamorph.wire.admin import Role
from anamorph_keysvc.credentials import Caller
from anamorph_keysvc.identity import settings, unverified
from anamorph_keysvc.identity.bearer import Identity
from anamorph_keysvc.identity.oidc import OidcIssuer
from anamorph_keysvc.identity.workloads import Workloads
from anamorph_keysvc.service import tokens

if TYPE_CHECKING:
    from tests.keysvc.identity.conftest import Issuer

HOLDER = Caller("key:1", Role.CLIENT, "acme")


def lookup(secret: str) -> Caller:
    """Where the one API key is known."""
    if secret != "amk_known":
        raise errors.Unauthenticated("no such key", code="unauthenticated")
    return HOLDER


@pytest.fixture
def identity(oidc: OidcIssuer) -> Identity:
    return Identity([oidc])


def refused(identity: Identity, authorization: str | None) -> str:
    with pytest.raises(errors.Unauthenticated) as caught:
        identity.authenticate(lookup, authorization)
    assert caught.value.code == "unauthenticated"
    assert caught.value.__cause__ is None
    return str(caught.value)


def inference_token() -> str:
    claims = {
        "iss": tokens.ISSUER,
        "aud": tokens.AUDIENCE,
        "sub": "x",
        "iat": 1,
        "exp": int(time.time()) + 300,
    }
    return jwt.encode(claims, ed25519.Ed25519PrivateKey.generate(), "EdDSA", {"kid": "sig"})


def test_api_key(identity: Identity) -> None:
    """An API key is looked up; an OIDC issuer is not asked."""
    assert identity.authenticate(lookup, "Bearer amk_known") == HOLDER
    assert identity.authenticate(lookup, "bearer amk_known") == HOLDER


def test_oidc_token(identity: Identity, issuer: Issuer) -> None:
    """A token goes to the issuer that it names."""
    assert identity.authenticate(lookup, f"Bearer {issuer.token()}").actor == "oidc:idp:alice"


def test_refusals_are_alike(identity: Identity, issuer: Issuer) -> None:
    """No answer tells an unknown key from a forged token, a foreign issuer or nonsense."""
    headers = [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic amk_known",
        "amk_known",
        "Bearer amk_unknown",
        "Bearer amg_unknown",
        "Bearer  amk_known",
        "Bearer nonsense",
        "Bearer a.b.c",
        "Bearer a.b.c.d.e",
        f"Bearer {issuer.token(aud='another')}",
        f"Bearer {issuer.token(iss='https://elsewhere.example')}",
        f"Bearer {issuer.token(iss=None)}",
        f"Bearer {issuer.token()} {issuer.token()}",
        f"Bearer {issuer.token()}\n",
        f"Bearer {inference_token()}",
    ]
    assert len({refused(identity, header) for header in headers}) == 1


def test_inference_tokens_are_never_taken(identity: Identity, issuer: Issuer) -> None:
    """What the compute zone sees is worthless here, whoever signed it."""
    for token in (inference_token(), issuer.token(iss=tokens.ISSUER)):
        refused(identity, f"Bearer {token}")
        assert not identity.looks_like_ours(f"Bearer {token}")
    assert issuer.asked == []
    assert (settings.INFERENCE_ISSUER, settings.INFERENCE_AUDIENCE) == (tokens.ISSUER, tokens.AUDIENCE)


def test_no_fallback_for_inference_tokens(issuer: Issuer, tmp_path: Path) -> None:
    """Where the cluster takes all other tokens, it still takes no inference token."""
    (tmp_path / "ca.crt").touch()
    cluster = settings.KubernetesSettings.model_validate(
        {
            "api_server": "https://127.0.0.1:1",
            "ca_file": tmp_path / "ca.crt",
            "audiences": ["anamorph-keysvc"],
            "bindings": [{"namespace": "jobs", "service_account": "*", "tenant": "acme"}],
        }
    )
    identity = Identity((), Workloads(cluster))
    account = "system:serviceaccount:jobs:job"
    assert identity.looks_like_ours(f"Bearer {issuer.token(sub=account)}")
    assert not identity.looks_like_ours(f"Bearer {issuer.token(sub=account, iss=tokens.ISSUER)}")
    refused(identity, f"Bearer {issuer.token(sub=account, iss=tokens.ISSUER)}")
    identity.close()


def test_large_tokens_are_not_parsed(identity: Identity, issuer: Issuer) -> None:
    """A token beyond 8 KiB is refused before anything reads it; one just below is taken."""
    fits, large = issuer.token(padding="x" * 5000), issuer.token(padding="x" * 7000)
    assert len(fits) < unverified.MOST_BYTES < len(large)
    assert identity.authenticate(lookup, f"Bearer {fits}")
    refused(identity, f"Bearer {large}")
    with pytest.raises(errors.Unauthenticated):
        unverified.claims(large)
    with pytest.raises(errors.Unauthenticated):
        identity.authenticate(lambda _secret: HOLDER, f"Bearer amk_{large}")


def test_each_issuer_has_its_own_keys(trusting: Callable[..., OidcIssuer], issuer: Issuer) -> None:
    """A token is verified by the issuer that it names, not by whichever would accept it."""
    other = trusting(
        name="other", issuer="https://other.example", tenant="globex", jwks_url=f"{issuer.url}/none"
    )
    identity = Identity([trusting(), other])
    issuer.down("/none")
    assert identity.authenticate(lookup, f"Bearer {issuer.token()}").tenant == "acme"
    with pytest.raises(errors.Unavailable):
        identity.authenticate(lookup, f"Bearer {issuer.token(iss='https://other.example')}")


def test_looks_like_ours(identity: Identity, issuer: Issuer) -> None:
    """What could be accepted is told from what could not, without verifying anything."""
    for ours in ("amk_x", "amg_x", issuer.token(), issuer.token(exp=1)):
        assert identity.looks_like_ours(f"Bearer {ours}")
    for foreign in ("x", "a.b.c", issuer.token(iss="https://elsewhere.example"), ""):
        assert not identity.looks_like_ours(f"Bearer {foreign}")
    assert not identity.looks_like_ours("Basic amk_x")
    assert issuer.asked == []


def test_without_settings_only_api_keys(issuer: Issuer) -> None:
    """Nobody is trusted unless configured."""
    identity = Identity()
    identity.check()
    assert identity.authenticate(lookup, "Bearer amk_known") == HOLDER
    refused(identity, f"Bearer {issuer.token()}")
    identity.close()
