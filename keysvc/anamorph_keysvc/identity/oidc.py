"""Tokens of an OIDC issuer: verified against its keys, then mapped to a tenant and a role."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jwt

from anamorph.errors import InvalidId
from anamorph.wire.admin import Role
from anamorph.wire.ids import check_label
from anamorph_keysvc.credentials import Caller
from anamorph_keysvc.identity import jwks
from anamorph_keysvc.identity.settings import Claim, OidcSettings
from anamorph_keysvc.identity.unverified import refused

_log = logging.getLogger(__name__)

# Identity and access tokens; any other type, such as a logout token, is signed for another purpose.
_TYPES = {"jwt", "at+jwt", "application/at+jwt"}
_PLAIN = re.compile(r"[A-Za-z0-9._@|:+=/-]{1,128}")
_REST = re.compile(r"[^A-Za-z0-9._@|:+=/-]")


class OidcIssuer:
    """One configured issuer.

    Args:
        clock: seconds, for the age of its keys; a token's own times are compared with the real time.
    """

    def __init__(
        self,
        settings: OidcSettings,
        *,
        development: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self._keys = jwks.of_issuer(settings, development=development, clock=clock)

    def authenticate(self, token: str) -> Caller:
        """The caller that a token names.

        Raises:
            Unauthenticated: not a valid token of this issuer, or one that maps to no role; one error for all.
            Unavailable: the issuer's keys cannot be had.
        """
        try:
            return self._caller(self._verified(token))
        except (jwt.PyJWTError, _Unmapped) as error:
            # The kind of fault only: messages of the library may quote what the caller sent.
            _log.info("refused a token of issuer %s: %s", self.settings.name, type(error).__name__)
            raise refused() from None

    def close(self) -> None:
        """Let go of what a fetch under way holds."""
        self._keys.close()

    def _verified(self, token: str) -> dict[str, Any]:
        header = jwt.get_unverified_header(token)
        kid, algorithm = header.get("kid"), header.get("alg")
        if not isinstance(kid, str) or algorithm not in self.settings.algorithms:
            raise jwt.InvalidAlgorithmError
        if str(header.get("typ", "jwt")).lower() not in _TYPES:
            raise jwt.DecodeError
        key = self._keys.key(kid, algorithm)
        if key is None:
            raise jwt.InvalidKeyError
        return self._decoded(token, key, algorithm)

    def _decoded(self, token: str, key: jwt.PyJWK, algorithm: str) -> dict[str, Any]:
        claims: dict[str, Any] = jwt.decode(
            token,
            key,
            algorithms=[algorithm],
            issuer=self.settings.issuer,
            audience=self.settings.audiences,
            leeway=self.settings.leeway_s,
            options={"require": ["iss", "aud", "sub", "exp", "iat"], "enforce_minimum_key_length": True},
        )
        return claims

    def _caller(self, claims: dict[str, Any]) -> Caller:
        role = self._role(claims)
        tenant = None if role is Role.PLATFORM else self._tenant(claims)
        return Caller(actor=f"oidc:{self.settings.name}:{printable(claims['sub'])}", role=role, tenant=tenant)

    def _role(self, claims: dict[str, Any]) -> Role:
        """The first configured role that the token has; a claim may be one word, or a list."""
        named = _at(claims, self.settings.roles_claim)
        held = named if isinstance(named, list) else [named]
        for value, role in self.settings.roles.items():
            if value in held:
                return role
        raise _Unmapped

    def _tenant(self, claims: dict[str, Any]) -> str:
        if self.settings.tenant is not None:
            return self.settings.tenant
        tenant = _at(claims, self.settings.tenant_claim or ())
        try:
            return check_label(tenant)  # which refuses what is no text as well
        except InvalidId:
            raise _Unmapped from None


class _Unmapped(Exception):
    """A genuine token that names no role or no tenant."""


def _at(claims: object, path: Claim) -> Any:
    for name in path:
        if not isinstance(claims, Mapping):
            return None
        claims = claims.get(name)
    return claims


def printable(subject: str) -> str:
    """A subject as it may stand in records: at most 128 plain characters.

    Any other subject gets them replaced and a digest behind '~', so that no two subjects look the same.

    Raises:
        jwt.exceptions.InvalidSubjectError: it is empty.
    """
    if not subject:
        raise jwt.exceptions.InvalidSubjectError
    if _PLAIN.fullmatch(subject):
        return subject
    digest = hashlib.sha256(subject.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return f"{_REST.sub('_', subject[:95])}~{digest}"
