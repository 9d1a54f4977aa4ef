"""OIDC tokens: only a genuine, fresh token for us, of a key and algorithm that are pinned, names a caller."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from anamorph import errors
from anamorph.wire.admin import Role
from anamorph_keysvc.credentials import Caller
from anamorph_keysvc.identity.oidc import OidcIssuer, printable

if TYPE_CHECKING:
    from tests.keysvc.identity.conftest import Issuer

HOUR = 3600


def segment(value: Any) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def refused(oidc: OidcIssuer, token: str) -> str:
    with pytest.raises(errors.Unauthenticated) as caught:
        oidc.authenticate(token)
    return str(caught.value)


@pytest.mark.parametrize("kid", ["rsa", "ec", "ed"])
def test_genuine_tokens(oidc: OidcIssuer, issuer: Issuer, kid: str) -> None:
    """A token of every pinned kind of key names its subject, its tenant and its role."""
    assert oidc.authenticate(issuer.token(kid)) == Caller("oidc:idp:alice", Role.ADMIN, "acme")


def test_discovery_or_a_given_url(trusting: Callable[..., OidcIssuer], issuer: Issuer) -> None:
    """The discovery document is asked only where no JWKS URL is set."""
    trusting(jwks_url=f"{issuer.url}/jwks").authenticate(issuer.token())
    assert issuer.asked == ["/jwks"]
    trusting().authenticate(issuer.token())
    assert issuer.asked[1:] == ["/.well-known/openid-configuration", "/jwks"]


@pytest.mark.parametrize(
    "changed",
    [
        {"iss": "https://elsewhere.example"},
        {"iss": None},
        {"aud": "another"},
        {"aud": []},
        {"aud": None},
        {"aud": {"anamorph-keysvc": 1}},
        {"exp": int(time.time()) - HOUR},
        {"exp": None},
        {"exp": "soon"},
        {"nbf": int(time.time()) + HOUR},
        {"iat": int(time.time()) + HOUR},
        {"iat": None},
        {"sub": None},
        {"sub": ""},
        {"sub": 7},
        {"groups": None},
        {"groups": ["visitors"]},
        {"groups": "keys-platform"},
        {"groups": {"keys-admin": True}},
        {"groups": [["keys-admin"]]},
    ],
)
def test_wrong_claims(oidc: OidcIssuer, issuer: Issuer, changed: dict[str, Any]) -> None:
    """Signed by the issuer, yet not for us, not now, or without a role: refused."""
    refused(oidc, issuer.token(**changed))


def test_leeway_is_the_configured_one(oidc: OidcIssuer, issuer: Issuer) -> None:
    """Clocks may differ by the leeway, and no more."""
    assert oidc.authenticate(issuer.token(exp=int(time.time()) - 1))
    refused(oidc, issuer.token(exp=int(time.time()) - 60))


def test_none(oidc: OidcIssuer, issuer: Issuer) -> None:
    """An unsigned token is refused, in whatever way it is spelt."""
    for algorithm in ("none", "None", "NONE", ""):
        refused(oidc, f"{segment({'alg': algorithm, 'kid': 'rsa'})}.{segment(issuer.claims())}.")


def test_public_key_as_secret(oidc: OidcIssuer, issuer: Issuer) -> None:
    """A token signed by HMAC with a public key as its secret is refused, whatever it calls itself."""
    public = issuer.keys["rsa"][0].public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for secret in (pem, pem.strip(), json.dumps(issuer.jwk("rsa")).encode()):
        for algorithm in ("HS256", "RS256"):
            signed = f"{segment({'alg': algorithm, 'kid': 'rsa'})}.{segment(issuer.claims())}"
            refused(oidc, f"{signed}.{segment(hmac.digest(secret, signed.encode(), hashlib.sha256))}")


def test_algorithm_not_pinned(trusting: Callable[..., OidcIssuer], issuer: Issuer) -> None:
    """A genuine key does not help with an algorithm that is not pinned."""
    oidc = trusting(algorithms=["ES256"])
    refused(oidc, issuer.token("rsa"))
    assert issuer.asked == []
    assert oidc.authenticate(issuer.token("ec"))


def test_key_serves_its_own_algorithm(trusting: Callable[..., OidcIssuer], issuer: Issuer) -> None:
    """A key that is published for one algorithm verifies no other, though its type fits."""
    oidc = trusting(algorithms=["RS256", "RS512", "PS256"])
    key = issuer.keys["rsa"][0]
    for algorithm in ("RS512", "PS256"):
        refused(oidc, jwt.encode(issuer.claims(), key, algorithm, {"kid": "rsa"}))


def test_kid_of_another_type(oidc: OidcIssuer, issuer: Issuer) -> None:
    """A token that names the key id of another type of key is refused."""
    for signer, named in (("rsa", "ec"), ("ec", "ed"), ("ed", "rsa")):
        refused(oidc, issuer.token(signer, headers={"kid": named}))


@pytest.mark.parametrize(
    "headers",
    [{"kid": None}, {"kid": ""}, {"kid": "unknown"}, {"typ": "logout+jwt"}, {"crit": ["x"], "x": 1}],
)
def test_wrong_headers(oidc: OidcIssuer, issuer: Issuer, headers: dict[str, Any]) -> None:
    """A key id that is missing or unknown, another type of token, an unknown critical header: refused."""
    key, algorithm = issuer.keys["rsa"]
    wanted = {"alg": algorithm, "typ": "JWT", "kid": "rsa", **headers}
    signed = f"{segment({k: v for k, v in wanted.items() if v is not None})}.{segment(issuer.claims())}"
    signature = jwt.get_algorithm_by_name(algorithm).sign(signed.encode(), key)
    refused(oidc, f"{signed}.{segment(signature)}")


def test_keys_in_the_token(oidc: OidcIssuer, issuer: Issuer) -> None:
    """A key that a token brings along, or points to, is never used."""
    mine = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    jwk = jwt.get_algorithm_by_name("RS256").to_jwk(mine.public_key(), as_dict=True)
    headers = {"kid": "rsa", "jwk": jwk, "jku": f"{issuer.url}/mine", "x5u": f"{issuer.url}/mine"}
    refused(oidc, jwt.encode(issuer.claims(), mine, "RS256", headers))
    assert "/mine" not in issuer.asked


def test_altered(oidc: OidcIssuer, issuer: Issuer) -> None:
    """Another header, other claims or another signature under a genuine token: refused."""
    header, claims, signature = issuer.token().split(".")
    other = issuer.token(sub="mallory").split(".")
    for parts in ((header, other[1], signature), (header, claims, other[2]), (header, claims, "")):
        refused(oidc, ".".join(parts))


def test_one_text_for_all(oidc: OidcIssuer, issuer: Issuer) -> None:
    """The answer does not tell what is wrong."""
    tokens = ["", "a.b.c", issuer.token(aud="x"), issuer.token(groups=[]), issuer.token(exp=1), "x" * 9000]
    assert len({refused(oidc, token) for token in tokens}) == 1


def test_nothing_of_a_token_is_logged(
    oidc: OidcIssuer, issuer: Issuer, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says of which issuer a token was refused and why, and quotes nothing from it."""
    with caplog.at_level("DEBUG", logger="anamorph_keysvc"):
        refused(oidc, issuer.token(sub="canary-subject", aud="canary-audience"))
    assert "InvalidAudienceError" in caplog.text
    assert "canary" not in caplog.text


def test_tenant_from_a_claim(trusting: Callable[..., OidcIssuer], issuer: Issuer) -> None:
    """A claim, of any depth, names the tenant; one that is missing or no id is refused."""
    oidc = trusting(tenant=None, tenant_claim=["org", "id"])
    assert oidc.authenticate(issuer.token(org={"id": "globex"})).tenant == "globex"
    for org in (None, "globex", {"id": "Globex"}, {"id": "../acme"}, {"id": "plaintext"}, {"id": ["acme"]}):
        refused(oidc, issuer.token(org=org))


def test_first_configured_role_counts(oidc: OidcIssuer, issuer: Issuer) -> None:
    """Of several roles the first in the settings counts, in whatever order the token has them."""
    assert oidc.authenticate(issuer.token(groups=["keys-rotator", "keys-admin"])).role is Role.ADMIN
    assert oidc.authenticate(issuer.token(groups="keys-rotator")).role is Role.ROTATOR


def test_platform_role_needs_its_mapping(trusting: Callable[..., OidcIssuer], issuer: Issuer) -> None:
    """A token is the platform's only where the settings say so, and then has no tenant."""
    oidc = trusting(tenant=None, tenant_claim="tenant", roles={"ops": "platform", "keys-admin": "admin"})
    caller = oidc.authenticate(issuer.token(groups=["ops"], tenant="acme"))
    assert (caller.role, caller.tenant) == (Role.PLATFORM, None)
    refused(oidc, issuer.token(groups=["platform"], tenant="acme"))


def test_subjects_stay_apart() -> None:
    """Any subject becomes short plain text, and no two become the same."""
    subjects = [
        "alice",
        "a" * 129,
        "a" * 130,
        "new\nline",
        "new_line",
        "new\tline",
        "é",
        "\ud800",
        "a~b",
        "a_b",
    ]
    shown = [printable(subject) for subject in subjects]
    assert shown[0] == "alice"
    assert len(set(shown)) == len(subjects)
    assert all(len(text) <= 128 and text.isascii() and text.isprintable() for text in shown)


def test_weak_and_unfit_keys(trusting: Callable[..., OidcIssuer], issuer: Issuer) -> None:
    """A short RSA key, a curve of another algorithm and a key for encryption verify nothing."""
    issuer.add("short", rsa.generate_private_key(public_exponent=65537, key_size=1024), "RS256")
    issuer.add("curve", ec.generate_private_key(ec.SECP384R1()), "ES384")
    jwks = [issuer.jwk("rsa"), issuer.jwk("short"), {**issuer.jwk("curve"), "alg": "ES256"}]
    jwks.append({**issuer.jwk("ec"), "use": "enc"})
    issuer.answers["/jwks"] = (
        200,
        {},
        json.dumps({"keys": [*jwks, 7, {}, {"kty": "oct", "k": "AA"}]}).encode(),
    )
    oidc = trusting()
    assert oidc.authenticate(issuer.token("rsa"))
    with pytest.warns(jwt.InsecureKeyLengthWarning):
        short = issuer.token("short")
    for token in (short, issuer.token("curve"), issuer.token("ec")):
        refused(oidc, token)
