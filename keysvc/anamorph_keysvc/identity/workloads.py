"""Kubernetes service accounts: their tokens are reviewed by the cluster's API server."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from anamorph import errors
from anamorph.wire.ids import check_label
from anamorph_keysvc import deadline
from anamorph_keysvc.credentials import Caller
from anamorph_keysvc.identity import unverified
from anamorph_keysvc.identity.bindings import EVERY, Binding
from anamorph_keysvc.identity.reviewer import Reviewer
from anamorph_keysvc.identity.settings import KubernetesSettings
from anamorph_keysvc.identity.unverified import refused

_log = logging.getLogger(__name__)

Exists = Callable[[str], bool]
"""Whether there is a tenant of that id."""

MOST_CACHED = 1024
_SERVICE_ACCOUNT = "system:serviceaccount:"


class Workloads:
    """The service accounts of one cluster that are bound to a tenant and a role.

    A service account without binding is unauthenticated, not forbidden: to us it is nobody, and
    an answer of its own would tell any pod of the cluster which accounts are bound.

    Args:
        exists: whether there is a tenant, for accounts that are bound by their names; none without it.
        clock: seconds, for how long a review is remembered.
        now: seconds since 1970, for the end of a token.
    """

    def __init__(
        self,
        settings: KubernetesSettings,
        *,
        exists: Exists = lambda _tenant: False,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.settings = settings
        self._exists, self._clock, self._now = exists, clock, now
        self._bindings = {(b.namespace, b.service_account): b for b in settings.bindings if not b.beginning}
        self._by_name = tuple(b for b in settings.bindings if b.beginning)
        self._reviewer = Reviewer(settings)
        self._places = threading.BoundedSemaphore(settings.concurrency)
        self._lock = threading.Lock()
        self._known: dict[str, _Known] = {}

    def authenticate(self, token: str) -> Caller:
        """The caller that a token belongs to.

        Raises:
            Unauthenticated: not a valid token for us, or its service account is bound to nothing.
            Unavailable: the API server does not answer, or does not let us review tokens.
        """
        claims = unverified.claims(token)
        # Before anybody is asked: a made-up token reaches the API server only if it names a bound account.
        self._bound(claims.get("sub"))
        fingerprint = hashlib.sha256(token.encode()).hexdigest()
        known = self._remembered(fingerprint)
        if known is None:
            known = self._existing(self._bound(self._review(token)))
            self._remember(fingerprint, known, claims.get("exp"))
        return known

    def check(self) -> None:
        """Make sure that we may review tokens.

        Raises:
            SetupError: the API server does not let us, or does not answer; the message names the remedy.
        """
        self._reviewer.check()

    def close(self) -> None:
        """Close the connections to the API server."""
        self._reviewer.close()

    def _review(self, token: str) -> str:
        """The user that a token belongs to; a crowd of callers waits here, not at the API server."""
        if not self._places.acquire(timeout=deadline.left(self.settings.timeout_s)):
            raise errors.Unavailable("too many tokens to review: try again", code="overloaded", retry_after=1)
        try:
            return self._reviewer.user_of(token)
        finally:
            self._places.release()

    def _bound(self, user: object) -> _Bound:
        """What a service account is bound to: by its own name, by how that begins, or by its namespace."""
        name = user if isinstance(user, str) and user.startswith(_SERVICE_ACCOUNT) else ""
        namespace, _, account = name.removeprefix(_SERVICE_ACCOUNT).partition(":")
        binding = (
            self._bindings.get((namespace, account))
            or self._beginning(namespace, account)
            or self._bindings.get((namespace, EVERY))
        )
        if binding is None or account in {"", EVERY}:
            raise _unbound()
        caller = Caller(f"kubernetes:{namespace}:{account}", binding.role, _tenant(binding, account))
        return _Bound(caller, binding.tenant_from is not None)

    def _beginning(self, namespace: str, account: str) -> Binding | None:
        """The one binding that the beginning of an account's name belongs to."""
        for binding in self._by_name:
            if binding.namespace == namespace and account.startswith(binding.beginning):
                return binding
        return None

    def _existing(self, bound: _Bound) -> Caller:
        """A caller whose tenant exists. Looked up after the review only, so that nobody else can ask."""
        if bound.by_name and not self._exists(bound.caller.tenant or ""):
            raise _unbound()
        return bound.caller

    def _remembered(self, fingerprint: str) -> Caller | None:
        with self._lock:
            known = self._known.get(fingerprint)
            return known.caller if known is not None and self._clock() < known.until else None

    def _remember(self, fingerprint: str, caller: Caller, expires_at: Any) -> None:
        """Keep a caller for a short while, and never past the end of its token."""
        if isinstance(expires_at, bool) or not isinstance(expires_at, (int, float)):
            return
        span = min(self.settings.cache_s, expires_at - self._now())
        with self._lock:
            self._known.pop(fingerprint, None)
            if span > 0:
                self._known[fingerprint] = _Known(caller, self._clock() + span)
            while len(self._known) > MOST_CACHED:
                del self._known[next(iter(self._known))]


def _tenant(binding: Binding, account: str) -> str | None:
    if binding.tenant_from is None:
        return binding.tenant
    try:
        return check_label(account.removeprefix(binding.beginning))
    except errors.InvalidId:
        raise _unbound() from None


def _unbound() -> errors.Unauthenticated:
    _log.info("refused a token: its service account is bound to no tenant")
    return refused()


@dataclass(frozen=True)
class _Bound:
    """Whom a service account would be, and whether its name says of which tenant."""

    caller: Caller
    by_name: bool


@dataclass(frozen=True)
class _Known:
    """A caller, and until when its review counts."""

    caller: Caller
    until: float
