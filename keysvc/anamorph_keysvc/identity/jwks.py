"""An issuer's public keys, fetched with care: no redirect, no large or slow answer, no unfit key."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import jwt

from anamorph import errors
from anamorph_keysvc.identity.keycache import KeyCache, Keys
from anamorph_keysvc.identity.settings import OidcSettings, is_private, may_fetch

MOST_BYTES = 256 * 1024
MOST_KEYS = 64
_DISCOVERY = "/.well-known/openid-configuration"


def of_issuer(
    settings: OidcSettings, *, development: bool, clock: Callable[[], float] = time.monotonic
) -> KeyCache:
    """The keys of a configured issuer; nothing is fetched before the first token comes."""
    return KeyCache(
        lambda: fetch(settings, development=development),
        ttl=settings.keys_ttl_s,
        stale=settings.keys_stale_s,
        interval=settings.refresh_interval_s,
        patience=settings.timeout_s,
        clock=clock,
    )


def fetch(settings: OidcSettings, *, development: bool) -> Keys:
    """The issuer's keys, over the network; the discovery document first, where no JWKS URL is set.

    Raises:
        Unavailable: an answer that is no key set, or that leads somewhere else.
        httpx.HTTPError: no answer.
    """
    ends_at = time.monotonic() + settings.timeout_s
    with _client(settings.ca_file, settings.timeout_s) as client:
        url = settings.jwks_url or _discovered(client, settings, ends_at, development=development)
        return parse(_json(client, url, ends_at), settings.algorithms)


def _client(ca_file: Path | None, timeout: float) -> httpx.Client:
    """Without redirects, and without proxies and credentials of the environment."""
    verify = (
        ssl.create_default_context(cafile=ca_file) if ca_file else httpx.create_ssl_context(trust_env=False)
    )
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    return httpx.Client(
        verify=verify, trust_env=False, follow_redirects=False, timeout=timeout, headers=headers
    )


def _discovered(client: httpx.Client, settings: OidcSettings, ends_at: float, *, development: bool) -> str:
    document = _json(client, settings.issuer.rstrip("/") + _DISCOVERY, ends_at)
    url = document.get("jwks_uri")
    if document.get("issuer") != settings.issuer:
        raise errors.Unavailable("the discovery document is of another issuer")
    if not isinstance(url, str) or not may_fetch(url, development=development):
        raise errors.Unavailable("the discovery document names no https URL for its keys")
    # Keys may live on another host, as Google's do, but not on an address inside our own network.
    if is_private(url) and urlsplit(url).hostname != urlsplit(settings.issuer).hostname:
        raise errors.Unavailable("the discovery document points into a private network")
    return url


def _json(client: httpx.Client, url: str, ends_at: float) -> dict[str, Any]:
    with client.stream("GET", url) as response:
        if response.status_code != httpx.codes.OK:
            raise errors.Unavailable(f"{url} answers {response.status_code}")
        body = _read(response, ends_at)
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise errors.Unavailable(f"{url} answers no JSON") from None
    if not isinstance(document, dict):
        raise errors.Unavailable(f"{url} answers no JSON object")
    return document


def _read(response: httpx.Response, ends_at: float) -> bytes:
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > MOST_BYTES:
            raise errors.Unavailable(f"{response.url} answers more than {MOST_BYTES} bytes")
        if time.monotonic() > ends_at:
            raise errors.Unavailable(f"{response.url} answers too slowly")
    return bytes(body)


def parse(document: dict[str, Any], algorithms: Iterable[str]) -> Keys:
    """The public signing keys of a key set, for the algorithms that are allowed; others are left out.

    Raises:
        Unavailable: none is left, or there are too many.
    """
    entries = document.get("keys")
    if not isinstance(entries, list) or len(entries) > MOST_KEYS:
        raise errors.Unavailable(f"not a set of at most {MOST_KEYS} keys")
    keys: Keys = {}
    for entry in filter(_is_signing_key, entries):
        for algorithm in algorithms:
            key = _key(entry, algorithm)
            if key is not None:
                # Of two keys with one id, the first counts: which one a caller meant is not ours to try.
                keys.setdefault((entry["kid"], algorithm), key)
    if not keys:
        raise errors.Unavailable("no key in the set can be used with the algorithms that are allowed")
    return keys


def _is_signing_key(entry: object) -> bool:
    """Whether an entry is a public key for verifying, with an id; a private one does not belong here."""
    if not isinstance(entry, dict) or entry.get("kty") not in {"RSA", "EC", "OKP"} or "d" in entry:
        return False
    kid, operations = entry.get("kid"), entry.get("key_ops", ["verify"])
    if not isinstance(kid, str) or not 0 < len(kid) <= 256 or entry.get("use", "sig") != "sig":
        return False
    return isinstance(operations, list) and "verify" in operations


def _key(entry: dict[str, Any], algorithm: str) -> jwt.PyJWK | None:
    if entry.get("alg", algorithm) != algorithm:
        return None
    try:
        key = jwt.PyJWK(entry, algorithm)
        key.Algorithm.prepare_key(key.key)  # a curve that is not the algorithm's is found out here
    except (jwt.PyJWTError, TypeError, ValueError, KeyError):
        return None
    return key
