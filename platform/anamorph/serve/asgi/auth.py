"""Inference tokens, verified offline: no call leaves the compute zone."""

from __future__ import annotations

from base64 import urlsafe_b64decode
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from starlette.datastructures import Headers

from anamorph.errors import Unauthenticated
from anamorph.wire.admin import PublicKey

ISSUER = "anamorph"
AUDIENCE = "inference"
OPERATOR = "operator"
# Clocks of two zones differ; more than this is a fault that should show.
LEEWAY_S = 30
LONGEST_LIFE_S = 15 * 60
LONGEST_TOKEN = 4096
_REQUIRED = ["exp", "iat", "iss", "aud", "sub", "tenant", "model"]


@dataclass(frozen=True)
class Caller:
    """Who an accepted token speaks for."""

    tenant: str
    model: str
    subject: str


class TokenVerifier:
    """Verifies tokens against the key service's public keys.

    Args:
        keys: what the operator pushed; replaced as a whole when it pushes again.
        clock: seconds since the epoch.
    """

    def __init__(self, keys: Iterable[PublicKey], clock: Callable[[], float]) -> None:
        self._keys = {key.kid: _public_key(key) for key in keys}
        self._clock = clock

    def verify(self, headers: Headers) -> Caller:
        """Check the ``Authorization`` header.

        Raises:
            Unauthenticated: absent, malformed, forged, expired, or meant for another audience.
                One message for all: it helps nobody to know how a forgery was found.
        """
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token or len(token) > LONGEST_TOKEN:
            raise refused()
        try:
            claims = self._claims(token)
        except (jwt.PyJWTError, ValueError, TypeError, KeyError):
            raise refused() from None
        return Caller(claims["tenant"], claims["model"], claims["sub"])

    def _claims(self, token: str) -> dict[str, str]:
        kid = jwt.get_unverified_header(token)["kid"]
        claims = jwt.decode(
            token,
            self._keys[kid],
            algorithms=["EdDSA"],
            issuer=ISSUER,
            audience=AUDIENCE,
            # Times are checked below, against the clock that was passed in.
            options={"require": _REQUIRED, "verify_exp": False, "verify_iat": False, "verify_nbf": False},
        )
        begins, ends, now = float(claims["iat"]), float(claims["exp"]), self._clock()
        timely = begins - LEEWAY_S <= now < ends + LEEWAY_S and ends - begins <= LONGEST_LIFE_S
        if not timely or not all(isinstance(claims[name], str) for name in ("tenant", "model", "sub")):
            raise refused()
        return claims


def refused() -> Unauthenticated:
    """The one answer to a missing, foreign or forged token."""
    return Unauthenticated(
        "this needs an inference token for this tenant and model; get one from the key service",
        code="invalid_token",
    )


def _public_key(key: PublicKey) -> Ed25519PublicKey:
    padded = key.x + "=" * (-len(key.x) % 4)
    return Ed25519PublicKey.from_public_bytes(urlsafe_b64decode(padded))
