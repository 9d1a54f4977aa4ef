"""An issuer's keys: fetched once for all, again when it helps, kept when it is down, never from elsewhere."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from tests.servers.kube import write_certificates

from anamorph import errors
from anamorph_keysvc import deadline
from anamorph_keysvc.identity import jwks
from anamorph_keysvc.identity.oidc import OidcIssuer

if TYPE_CHECKING:
    from tests.keysvc.identity.conftest import Issuer, Ticks

DISCOVERY = "/.well-known/openid-configuration"


def outcome(oidc: OidcIssuer, token: str) -> str:
    try:
        return oidc.authenticate(token).actor
    except errors.ServiceError as error:
        return type(error).__name__


def fetches(issuer: Issuer) -> int:
    return issuer.asked.count("/jwks")


def test_one_fetch_for_32_threads(oidc: OidcIssuer, issuer: Issuer) -> None:
    """However many callers come at once, the issuer is asked once, and all are answered."""
    issuer.open.clear()
    token, start = issuer.token(), threading.Barrier(33)

    def call() -> str:
        start.wait()
        return outcome(oidc, token)

    with ThreadPoolExecutor(32) as pool:
        calls = [pool.submit(call) for _ in range(32)]
        start.wait()
        issuer.open.set()
        assert {call.result() for call in calls} == {"oidc:idp:alice"}
    assert fetches(issuer) == 1


def test_made_up_key_ids_are_no_flood(oidc: OidcIssuer, issuer: Issuer, ticks: Ticks) -> None:
    """A thousand unknown key ids cost one fetch per interval."""
    oidc.authenticate(issuer.token())
    ticks.now += 11
    for n in range(1000):
        assert outcome(oidc, issuer.token("ed", headers={"kid": f"made-up-{n}"})) == "Unauthenticated"
    assert fetches(issuer) == 2


def test_new_key(oidc: OidcIssuer, issuer: Issuer, ticks: Ticks) -> None:
    """A key that the issuer begins to use is found before the TTL is over."""
    oidc.authenticate(issuer.token())
    issuer.add("next", ed25519.Ed25519PrivateKey.generate(), "EdDSA")
    ticks.now += 11
    assert outcome(oidc, issuer.token("next")) == "oidc:idp:alice"


def test_withdrawn_key(oidc: OidcIssuer, issuer: Issuer, ticks: Ticks) -> None:
    """A key that the issuer withdraws is refused once the TTL is over."""
    token = issuer.token("ed")
    assert outcome(oidc, token) == "oidc:idp:alice"
    del issuer.keys["ed"]
    ticks.now += 301
    assert outcome(oidc, token) == "Unauthenticated"


def test_issuer_down(oidc: OidcIssuer, issuer: Issuer, ticks: Ticks) -> None:
    """Known keys outlast an issuer that is down, for a bounded time; then the answer is 503, not 401."""
    token = issuer.token()
    oidc.authenticate(token)
    issuer.down()
    ticks.now += 301
    assert outcome(oidc, token) == "oidc:idp:alice"
    ticks.now += 3600
    assert outcome(oidc, token) == "Unavailable"
    issuer.up()
    ticks.now += 11
    assert outcome(oidc, token) == "oidc:idp:alice"


def test_issuer_down_from_the_start(oidc: OidcIssuer, issuer: Issuer) -> None:
    """Without any key nobody can tell whether a token is good: 503."""
    issuer.down()
    assert [outcome(oidc, issuer.token()) for _ in range(5)] == ["Unavailable"] * 5
    assert fetches(issuer) == 1


def test_unknown_key_while_down(oidc: OidcIssuer, issuer: Issuer, ticks: Ticks) -> None:
    """An unknown key id may be a new one, as long as the issuer cannot be asked: 503."""
    oidc.authenticate(issuer.token())
    issuer.add("next", ed25519.Ed25519PrivateKey.generate(), "EdDSA")
    issuer.down()
    ticks.now += 11
    assert outcome(oidc, issuer.token("next")) == "Unavailable"


def test_hanging_issuer(trusting: Callable[..., OidcIssuer], issuer: Issuer) -> None:
    """An issuer that accepts and never answers holds no caller beyond its deadline."""
    oidc = trusting(timeout_s=10)
    issuer.open.clear()
    with deadline.within(0.1):
        assert outcome(oidc, issuer.token()) == "Unavailable"
    under_way = [thread for thread in threading.enumerate() if thread.name == "anamorph-jwks"]
    assert under_way, "the caller waited for the fetch to end"
    issuer.open.set()
    oidc.close()
    assert not under_way[0].is_alive()


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (302, {"Location": "/elsewhere"}, b""),
        (200, {}, b"[]"),
        (200, {}, b"nonsense"),
        (200, {}, b"[" * 100_000),
        (200, {}, b'{"keys": []}'),
        (200, {}, b'{"keys": {}}'),
        (500, {}, b'{"keys": []}'),
    ],
)
def test_useless_answers(
    oidc: OidcIssuer, issuer: Issuer, status: int, headers: dict[str, str], body: bytes
) -> None:
    """A redirect, a huge answer or no key set is as if nothing had been answered."""
    issuer.answers["/jwks"] = (status, headers, body)
    assert outcome(oidc, issuer.token()) == "Unavailable"
    assert "/elsewhere" not in issuer.asked


def test_huge_answer(oidc: OidcIssuer, issuer: Issuer, ticks: Ticks) -> None:
    """An answer beyond the limit is not read to its end, though good keys stand in it."""
    document = {"keys": [issuer.jwk("rsa")], "more": "x" * jwks.MOST_BYTES}
    issuer.answers["/jwks"] = (200, {}, json.dumps(document).encode())
    assert outcome(oidc, issuer.token()) == "Unavailable"
    issuer.answers["/jwks"] = (200, {}, json.dumps({**document, "more": ""}).encode())
    ticks.now += 11
    assert outcome(oidc, issuer.token()) == "oidc:idp:alice"


@pytest.mark.parametrize(
    "jwks_uri",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/jwks",
        "//127.0.0.1/jwks",
        "http://example.com/jwks",
        "",
        None,
        7,
    ],
)
def test_discovery_leads_nowhere_else(oidc: OidcIssuer, issuer: Issuer, jwks_uri: object) -> None:
    """A discovery document leads to https URLs only, or to this machine while developing."""
    document = {"issuer": issuer.url, "jwks_uri": jwks_uri}
    issuer.answers[DISCOVERY] = (200, {}, json.dumps(document).encode())
    assert outcome(oidc, issuer.token()) == "Unavailable"
    assert fetches(issuer) == 0


@pytest.mark.parametrize(
    "host",
    ["169.254.169.254", "10.0.0.1", "[::1]", "[fd00::1]", "127.0.0.2", "localhost", "[::ffff:10.0.0.1]"],
)
def test_discovery_leads_to_no_private_address(issuer: Issuer, host: str) -> None:
    """Another host inside our own network is not asked, whatever the discovery document says."""
    document = {"issuer": issuer.url, "jwks_uri": f"https://{host}/jwks"}
    issuer.answers[DISCOVERY] = (200, {}, json.dumps(document).encode())
    with pytest.raises(errors.Unavailable, match="private network"):
        jwks.fetch(issuer.settings(), development=True)


def test_discovery_of_another_issuer(oidc: OidcIssuer, issuer: Issuer) -> None:
    """A document that names another issuer is not this issuer's."""
    document = {"issuer": "https://elsewhere.example", "jwks_uri": f"{issuer.url}/jwks"}
    issuer.answers[DISCOVERY] = (200, {}, json.dumps(document).encode())
    assert outcome(oidc, issuer.token()) == "Unavailable"


def test_plain_http_outside_development(issuer: Issuer) -> None:
    """In production not even this machine is asked without TLS, wherever the URL comes from."""
    with pytest.raises(errors.Unavailable, match="no https URL"):
        jwks.fetch(issuer.settings(), development=False)


def test_private_keys_are_left_out(issuer: Issuer) -> None:
    """A set that publishes a private key does not make it usable."""
    key, algorithm = issuer.keys["ed"]
    leaked = {**jwt.get_algorithm_by_name(algorithm).to_jwk(key, as_dict=True), "kid": "leaked"}
    assert "d" in leaked
    found = jwks.parse({"keys": [leaked, issuer.jwk("rsa")]}, ["EdDSA", "RS256"])
    assert list(found) == [("rsa", "RS256")]


def test_key_without_algorithm(issuer: Issuer) -> None:
    """A key that names no algorithm serves those of its type and curve that are pinned, and no other."""
    bare = [{k: v for k, v in issuer.jwk(kid).items() if k != "alg"} for kid in ("rsa", "ec", "ed")]
    found = jwks.parse({"keys": bare}, ["RS256", "PS256", "ES256", "ES384", "EdDSA"])
    assert set(found) == {("rsa", "RS256"), ("rsa", "PS256"), ("ec", "ES256"), ("ed", "EdDSA")}


def test_too_many_keys(issuer: Issuer) -> None:
    """A set beyond the limit is refused as a whole."""
    with pytest.raises(errors.Unavailable, match="at most"):
        jwks.parse({"keys": [issuer.jwk("ed")] * (jwks.MOST_KEYS + 1)}, ["EdDSA"])


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    write_certificates(tmp_path)
    return tmp_path


@pytest.fixture
def behind_tls(issuer: Issuer, certificates: Path) -> Iterator[str]:
    """The same keys over TLS."""
    body = issuer.answer("/jwks")[2]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            """Quiet."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.crt", certificates / "server.key")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_arguments: None  # type: ignore[method-assign]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"https://127.0.0.1:{server.server_port}/jwks"
        server.shutdown()
        thread.join()


def test_certificates_are_checked(
    trusting: Callable[..., OidcIssuer], issuer: Issuer, behind_tls: str, certificates: Path
) -> None:
    """Keys over TLS count only under an authority that is trusted: the usual ones, or the one configured."""
    assert outcome(trusting(jwks_url=behind_tls), issuer.token()) == "Unavailable"
    known = trusting(jwks_url=behind_tls, ca_file=certificates / "ca.crt")
    assert outcome(known, issuer.token()) == "oidc:idp:alice"
