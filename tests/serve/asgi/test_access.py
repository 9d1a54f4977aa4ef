"""Who gets in, in which order the refusals come, and what they look like."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import jwt
import pytest

from anamorph.wire.inference import KEY_ID_HEADER
from anamorph.wire.serving import KeyState

if TYPE_CHECKING:
    import httpx
    from tests.serve.conftest import Issuer, Serve, Served

BODY = {"prompt": [1, 2, 3], "max_tokens": 2}


def check(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.json()["error"]["code"] == code


def forged(issuer: Issuer, header: dict[str, Any]) -> str:
    def part(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    return f"{part(header)}.{part(issuer.claims())}."


async def test_open_and_closed_paths(served: Served) -> None:
    """Health and metrics need no token; everything else answers 401 and says how to authenticate."""
    for path in ("/healthz", "/metrics"):
        assert (await served.http.get(path)).status_code == 200
    for path in ("/v1/models", "/usage", "/nothing"):
        response = await served.http.get(path)
        check(response, 401, "invalid_token")
        assert response.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(
    "claims",
    [
        {"aud": "keysvc"},
        {"aud": None},
        {"iss": "someone"},
        {"tenant": "globex"},
        {"tenant": None},
        {"model": "other"},
        {"model": ["smol"]},
        {"sub": None},
        {"exp": None},
        {"iat": None},
        {"exp": "soon"},
        {"exp": float("nan")},
    ],
)
async def test_claims_of_another_purpose_are_refused(served: Served, claims: dict[str, Any]) -> None:
    """A token must say for whom, for what and until when, all of it right."""
    response = await served.http.post("/v1/completions", json=BODY, headers=served.headers(**claims))
    check(response, 401, "invalid_token")


@pytest.mark.parametrize(("age", "accepted"), [(-29, True), (-31, False), (629, True), (631, False)])
async def test_tokens_live_for_their_time_and_a_little_clock_skew(
    served: Served, age: float, accepted: bool
) -> None:
    """Thirty seconds of clock difference are forgiven, in both directions, and no more."""
    headers = served.headers()
    served.clock.now += age
    response = await served.http.get("/v1/models", headers=headers)
    assert response.status_code == (200 if accepted else 401)


async def test_a_token_that_would_live_for_hours_is_refused(served: Served) -> None:
    """The key service issues 15 minutes at most; anything longer did not come from it."""
    hours = served.headers(exp=int(served.clock.now) + 3600)
    check(await served.http.get("/v1/models", headers=hours), 401, "invalid_token")


async def test_forged_tokens_are_refused(served: Served, issuer: Issuer) -> None:
    """Another key, no signature, a symmetric signature by the public key, an unknown key id: one answer."""
    other = type(issuer)()
    public = issuer.jwks[0].x
    tokens = [
        other.token(),
        forged(issuer, {"alg": "none", "kid": "k1"}),
        forged(issuer, {"alg": "EdDSA", "kid": "k1"}),
        jwt.encode(issuer.claims(), public, algorithm="HS256", headers={"kid": "k1"}),
        type(issuer)(kid="k2", key=issuer.key).token(),
        issuer.token() + "A" * 5000,
        "not.a.token",
    ]
    for token in tokens:
        response = await served.http.get("/v1/models", headers={"Authorization": f"Bearer {token}"})
        check(response, 401, "invalid_token")


async def test_a_key_that_is_withdrawn_lets_nobody_in(served: Served) -> None:
    """Public keys are replaced as a whole; before the first push nobody is let in."""
    headers = served.headers()
    served.endpoint.reconfigure(KeyState())
    check(await served.http.get("/v1/models", headers=headers), 401, "invalid_token")


@pytest.mark.parametrize(
    ("status", "answer", "code"), [("suspended", 403, "suspended"), ("gone", 410, "key_gone")]
)
async def test_the_state_of_a_key_is_for_its_owner(serve: Serve, status: str, answer: int, code: str) -> None:
    """A suspended or gone version says so to its tenant, and 401 to everyone else."""
    served = serve(status=status)
    check(await served.complete(**BODY), answer, code)
    stranger = served.headers(tenant="globex")
    check(await served.http.post("/v1/completions", json=BODY, headers=stranger), 401, "invalid_token")


async def test_usage_is_for_the_operator_even_when_the_key_is_gone(serve: Serve) -> None:
    """Served tokens are read until the last request of a version is over, by the operator alone."""
    served = serve(status="gone")
    operator = served.headers(sub="operator")
    assert (await served.http.get("/usage", headers=operator)).status_code == 200
    check(await served.http.get("/usage", headers=served.headers()), 401, "invalid_token")


@pytest.mark.parametrize(
    ("named", "status", "code"),
    [
        (None, 400, "missing_key_id"),
        ("nonsense", 400, "invalid_value"),
        ("acme.smol.v1.0123456789ABCDEF", 400, "invalid_value"),
        ("acme.smol.v2.0123456789abcdef", 409, "wrong_key"),
        ("globex.smol.v1.0123456789abcdef", 409, "wrong_key"),
    ],
)
async def test_completions_name_their_key(served: Served, named: str | None, status: int, code: str) -> None:
    """Ids under another key would get fluent nonsense, so they get an error."""
    headers = {k: v for k, v in served.headers().items() if k != KEY_ID_HEADER}
    headers |= {} if named is None else {KEY_ID_HEADER: named}
    check(await served.http.post("/v1/completions", json=BODY, headers=headers), status, code)


async def test_a_baseline_has_no_key(serve: Serve) -> None:
    """The plaintext baseline needs no key id, answers none, and refuses ids of any key."""
    served = serve(tenant="plaintext", version=0, protection="plaintext", key_id=None)
    headers = served.headers(tenant="plaintext")
    response = await served.http.post("/v1/completions", json=BODY, headers=headers)
    assert response.status_code == 200
    assert KEY_ID_HEADER not in response.headers
    assert response.json()["system_fingerprint"] == "plaintext"
    keyed = {**headers, KEY_ID_HEADER: "acme.smol.v1.0123456789abcdef"}
    check(await served.http.post("/v1/completions", json=BODY, headers=keyed), 409, "wrong_key")


async def test_large_bodies_are_refused_before_they_are_read(serve: Serve) -> None:
    """By the announced length, or while a chunked body is read; never after."""
    served = serve(max_body_bytes=1024)
    check(await served.complete(prompt=[1] * 600), 413, "body_too_large")
    sent = []

    async def chunks() -> Any:
        for i in range(100):
            sent.append(i)
            yield b" " * 100

    response = await served.http.post("/v1/completions", content=chunks(), headers=served.headers())
    check(response, 413, "body_too_large")


async def test_paths_and_methods_that_are_not_there(served: Served) -> None:
    """404 and 405 have OpenAI's shape too."""
    check(await served.http.get("/v1/nothing", headers=served.headers()), 404, "not_found")
    response = await served.http.get("/v1/completions", headers=served.headers())
    check(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


async def test_models_says_what_is_served(served: Served) -> None:
    """The list names the model, its key, its vocabulary and how long a context may be."""
    (model,) = (await served.http.get("/v1/models", headers=served.headers())).json()["data"]
    assert model["id"] == "smol"
    assert model["key_id"] == served.endpoint.settings.key_id
    assert (model["vocab_size"], model["max_model_len"]) == (500, 200)
