"""Three identities, one cached token each: renewed at two thirds of its life, replaced at its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from opentelemetry import trace

from anamorph.errors import SetupError, Unavailable
from anamorph_keysvc import deadline
from anamorph_keysvc.vault.login import Granted, Login, denied, granted, login_of, lookup
from anamorph_keysvc.vault.settings import Identity, VaultSettings
from anamorph_keysvc.vault.transport import RETRY_AFTER_S, Answer, Call, Observer, Transport

Clock = Callable[[], float]
_RENEW_S = 1.0
_FOREVER = float("inf")


@dataclass(frozen=True)
class _Held:
    """A token with the moments, on our clock, at which to renew it and at which it is no more."""

    granted: Granted = field(repr=False)
    renew_at: float
    ends_at: float

    @classmethod
    def since(cls, now: float, granted: Granted) -> _Held:
        ttl = granted.ttl_s or _FOREVER
        return cls(granted, now + ttl * 2 / 3, now + ttl)


class Caller:
    """One identity: calls with its token, of which there is one however many threads call.

    Args:
        login: makes a new token.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        identity: Identity,
        transport: Transport,
        login: Login,
        deadline_s: float,
        clock: Clock = time.monotonic,
    ) -> None:
        self.identity = identity
        self._transport, self._login, self._deadline_s, self._clock = transport, login, deadline_s, clock
        self._lock = threading.Lock()
        self._held: _Held | None = None
        self._first_ttl_s = 0.0

    def call(self, call: Call) -> Answer:
        """The answer, 403 included where the policy refuses; a token that has died is replaced once.

        Raises:
            Unavailable, InvalidId: as ``Transport.call``.
            SetupError: a credential's file is missing, or its secret was opened by somebody else.
        """
        with deadline.within(self._deadline_s):
            held = self._token()
            answer = self._transport.call(call, held.granted.token)
            if answer.status != 403 or self._lives(held):
                return answer
            self._forget(held)
            return self._transport.call(call, self._token().granted.token)

    def must(self, call: Call) -> Answer:
        """As ``call``, for what no circumstances but a wrong policy lets Vault refuse.

        Raises:
            Unavailable: also ``kms_denied``, for a refusal.
        """
        answer = self.call(call)
        if not answer.ok:
            raise denied(self.identity)
        return answer

    def ready(self) -> None:
        """Return if Vault takes this identity's token now.

        Raises:
            Unavailable, SetupError: as ``call``.
        """
        self.must(lookup())

    def hold(self) -> None:
        """Log in unless a token is held, so that nobody has to while Vault is hard to reach.

        A wrapped secret id opens once: opened in an outage, with the answer lost, it is lost as well.

        Raises:
            Unavailable, SetupError: as ``call``.
        """
        with deadline.within(self._deadline_s):
            self._token()

    def renew_due(self) -> None:
        """Renew the token if its time has come; failing is no error as long as the token lives."""
        held = self._held
        if held is not None and self._clock() >= held.renew_at:
            self._renew(held)

    def close(self) -> None:
        """Revoke the token if we made it; where that fails it ends with its TTL."""
        with self._lock:
            held, self._held = self._held, None
        if held is not None:
            self._revoke(held)

    def _token(self) -> _Held:
        held, now = self._held, self._clock()
        if held is None or now >= held.ends_at:
            return self._log_in(held)
        if now >= held.renew_at:
            self._renew(held)
        return self._held or held

    def _log_in(self, seen: _Held | None) -> _Held:
        with self._alone():
            # While we waited for our turn another thread may have done it.
            if self._held is seen:
                return self._replace()
            return self._held or self._replace()

    def _replace(self) -> _Held:
        """A new token; the lock is held."""
        try:
            fresh = self._login()
        except (Unavailable, SetupError):
            self._count("login", "failed")
            raise
        self._count("login", "ok")
        old, new = self._held, _Held.since(self._clock(), fresh)
        self._held = new
        self._first_ttl_s = fresh.ttl_s
        if old is not None and self._clock() < old.ends_at:
            self._revoke(old)
        return new

    def _renew(self, held: _Held) -> None:
        """By one thread; the others go on with the token, which has a third of its life left."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self._held is held:
                with deadline.within(_RENEW_S):
                    self._renew_or_replace(held)
        except (Unavailable, SetupError):
            self._held = replace(held, renew_at=min(held.ends_at, self._clock() + RETRY_AFTER_S))
        finally:
            self._lock.release()

    def _renew_or_replace(self, held: _Held) -> None:
        if not held.granted.renewable:
            self._replace()
            return
        path = ("auth", "token", "renew-self")
        answer = self._transport.call(Call("renew", "POST", path, repeatable=True), held.granted.token)
        self._count("renew", answer.outcome)
        if not answer.ok:
            self._replace()
            return
        renewed = replace(granted(answer.body["auth"]), ours=held.granted.ours)
        self._held = _Held.since(self._clock(), renewed)
        # Near its greatest age a token is renewed for less and less: better a new one in good time.
        if renewed.ttl_s < self._first_ttl_s / 2:
            self._replace()

    def _lives(self, held: _Held) -> bool:
        return self._transport.call(lookup(), held.granted.token).ok

    def _forget(self, held: _Held) -> None:
        with self._alone():
            if self._held is held:
                self._held = None

    def _revoke(self, held: _Held) -> None:
        if held.granted.ours:
            path = ("auth", "token", "revoke-self")
            with suppress(Unavailable), deadline.within(_RENEW_S):
                self._transport.call(Call("revoke", "POST", path), held.granted.token)

    def _count(self, kind: str, outcome: str) -> None:
        self._transport.observer.observe(f"{kind}_{self.identity.value}", outcome)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=deadline.left(self._deadline_s)):
            raise Unavailable(
                "the login at Vault takes too long", code="kms_unavailable", retry_after=RETRY_AFTER_S
            )
        try:
            yield
        finally:
            self._lock.release()


@dataclass(frozen=True)
class Vault:
    """One Vault and our three identities there; ``close`` revokes their tokens."""

    settings: VaultSettings
    transport: Transport
    issuer: Caller
    releaser: Caller
    shredder: Caller

    @classmethod
    def open(
        cls,
        settings: VaultSettings,
        observer: Observer | None = None,
        *,
        tracer: trace.Tracer | None = None,
        clock: Clock = time.monotonic,
    ) -> Vault:
        """Nothing is asked of Vault yet.

        Raises:
            SetupError: a file that the settings name is missing.
        """
        transport = Transport(settings, observer, tracer=tracer)

        def caller(identity: Identity) -> Caller:
            login = login_of(settings, identity, transport)
            return Caller(identity, transport, login, settings.deadline_s, clock)

        return cls(settings, transport, *(caller(identity) for identity in Identity))

    @property
    def callers(self) -> tuple[Caller, Caller, Caller]:
        """All identities."""
        return self.issuer, self.releaser, self.shredder

    def hold(self) -> None:
        """Log in as whom no token is held; a worker calls this when it starts and every few seconds.

        Raises:
            Unavailable, SetupError: as ``Caller.call``, at the first identity that cannot.
        """
        for caller in self.callers:
            caller.hold()

    def renew_due(self) -> None:
        """Renew the tokens whose time has come; a worker calls this every few seconds."""
        for caller in self.callers:
            caller.renew_due()

    def close(self) -> None:
        """Revoke our tokens and close the connections."""
        for caller in self.callers:
            caller.close()
        self.transport.close()
