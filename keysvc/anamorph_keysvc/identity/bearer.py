"""Who sent a request: an API key or grant, an OIDC token, or a service account's token."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from anamorph import errors
from anamorph_keysvc.credentials import API_KEY, GRANT, Caller
from anamorph_keysvc.identity import unverified
from anamorph_keysvc.identity.oidc import OidcIssuer
from anamorph_keysvc.identity.settings import INFERENCE_ISSUER, IdentitySettings, KubernetesSettings
from anamorph_keysvc.identity.unverified import MOST_BYTES, refused

if TYPE_CHECKING:
    from anamorph_keysvc.identity.workloads import Exists, Workloads

Verify = Callable[[str], Caller]
"""From a secret or token to its caller."""


class Identity:
    """Everybody who may call.

    Args:
        issuers: OIDC issuers, each responsible for the tokens that name it.
        workloads: service accounts: of the cluster's issuer, where it is set, else of any other one.
    """

    def __init__(self, issuers: Iterable[OidcIssuer] = (), workloads: Workloads | None = None) -> None:
        self._issuers = {issuer.settings.issuer: issuer for issuer in issuers}
        self._workloads = workloads

    def authenticate(self, session_lookup: Verify, authorization: str | None) -> Caller:
        """The caller that an Authorization header belongs to; one error text for all that is refused.

        Call it outside a transaction: it may ask an issuer or the API server.

        Args:
            session_lookup: finds the holder of an API key or grant, given the secret.
            authorization: the header, or None.

        Raises:
            Unauthenticated: nothing here accepts it.
            Unavailable: who would know does not answer.
        """
        try:
            token = _bearer(authorization)
            if token.startswith((API_KEY, GRANT)):
                return session_lookup(token)
            return self._verifier(token)(token)
        except errors.Unauthenticated:
            raise refused() from None

    def looks_like_ours(self, authorization: str) -> bool:
        """Whether a header could be accepted by anything here; nothing is verified."""
        try:
            token = _bearer(authorization)
            return token.startswith((API_KEY, GRANT)) or self._verifier(token) is not None
        except errors.Unauthenticated:
            return False

    def check(self) -> None:
        """Make sure, at the start, that service accounts can be reviewed; issuers are asked when needed.

        Raises:
            SetupError: they cannot; the message names the remedy.
        """
        if self._workloads is not None:
            self._workloads.check()

    def close(self) -> None:
        """Close all connections."""
        for issuer in self._issuers.values():
            issuer.close()
        if self._workloads is not None:
            self._workloads.close()

    def _verifier(self, token: str) -> Verify:
        """Exactly one, by the issuer that the token names; an inference token has none."""
        named = unverified.claims(token).get("iss")
        if not isinstance(named, str) or named == INFERENCE_ISSUER:
            raise refused()
        if named in self._issuers:
            return self._issuers[named].authenticate
        if self._workloads is None or self._workloads.settings.issuer not in {None, named}:
            raise refused()
        return self._workloads.authenticate


def open_identity(settings: IdentitySettings, exists: Exists) -> Identity:
    """What the settings describe; nothing is asked of anybody yet.

    Args:
        settings: whose tokens are taken.
        exists: whether there is a tenant of some id.

    Raises:
        SetupError: the Kubernetes settings do not fit this machine.
    """
    issuers = [OidcIssuer(one, development=settings.development) for one in settings.oidc]
    return Identity(issuers, _workloads(settings.kubernetes, exists) if settings.kubernetes else None)


def _workloads(settings: KubernetesSettings, exists: Exists) -> Workloads:
    # The cluster's client takes more than a second to import, and most services need none.
    from anamorph_keysvc.identity.workloads import Workloads

    return Workloads(settings, exists=exists)


def _bearer(authorization: str | None) -> str:
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not token or len(token) > MOST_BYTES:
        raise refused()
    return token
