"""One member of a pool as it is answered: by its endpoint once it is open, until then by why not."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from anamorph import telemetry
from anamorph.errors import Unavailable
from anamorph.serve.api.admission import Admission
from anamorph.serve.api.app import build_app
from anamorph.serve.api.endpoint import Endpoint
from anamorph.serve.asgi.auth import TokenVerifier
from anamorph.serve.asgi.connection import lifespan
from anamorph.serve.asgi.middleware import Answers, Authentication, KeyStatus
from anamorph.serve.engines.base import Load, Sampling, Token
from anamorph.serve.slots.base import Opened
from anamorph.serve.slots.engine import SlotEngine
from anamorph.wire.admin import PublicKey
from anamorph.wire.serving import REPLICA_REFUSED, EngineSettings, KeyState, PoolMember, PoolSettings

RETRY_OPENING_S = 5


class MemberEngine:
    """One member's view of the pool's engine: an ``Engine``."""

    def __init__(self, engine: SlotEngine, key_id: str, opened: Opened) -> None:
        self._engine = engine
        self._key_id = key_id
        self._opened = opened
        self.vocab_size = opened.vocab_size
        self.context_length = opened.context_length
        self.eos_ids = opened.eos_ids

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Token, None]:
        """Generate one sequence; closing the generator cancels it."""
        return self._engine.submit(self._key_id, self._opened, prompt, sampling)

    def healthy(self) -> bool:
        """Whether the pool computes."""
        return self._engine.healthy()

    def load(self) -> Load:
        """Sequences of this member."""
        return self._engine.load(self._key_id)

    def close(self) -> None:
        """The engine is the pool's: it goes on."""


class Seat:
    """A member's place in the pool, with its own key state, checks and counters.

    Args:
        pool: settings of the pool.
        member: as the operator pushed it.
        clock: seconds since the epoch, for tokens.
    """

    def __init__(self, pool: PoolSettings, member: PoolMember, clock: Callable[[], float]) -> None:
        self.member = member
        self.settings = engine_settings(pool, member)
        self.refused: str | None = None
        self.opened = False
        self.asked = False
        self._clock = clock
        self._endpoint: Endpoint | None = None
        self._state = KeyState()
        self._verifier = TokenVerifier((), clock)
        app: ASGIApp = KeyStatus(self._unready, lambda: self._state)
        app = Authentication(app, lambda: self._verifier, self.settings)
        self._closed_app: ASGIApp = Answers(app, member.key_id)
        self._app: ASGIApp = self._closed_app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def update(self, member: PoolMember, jwks: tuple[PublicKey, ...]) -> None:
        """Take over key state and limits; from now on they decide."""
        self.member = member
        self._state = KeyState(status=member.status, jwks=jwks)
        self._verifier = TokenVerifier(jwks, self._clock)
        if self._endpoint is not None:
            self._endpoint.reconfigure(self._state)

    def open(self, engine: SlotEngine, opened: Opened, observed: telemetry.Telemetry) -> None:
        """Answer by the engine."""
        key_id = self.member.key_id
        view = MemberEngine(engine, key_id, opened)
        endpoint = Endpoint(self.settings, view, observed, clock=self._clock, gauges=False)
        places = self.settings.max_concurrent + self.settings.max_queued
        endpoint.admission = Admission(places, retry_after=lambda: max(1.0, engine.rate_wait(key_id)))
        endpoint.reconfigure(self._state)
        self._endpoint, self._app, self.opened = endpoint, build_app(endpoint), True

    def close(self) -> None:
        """Answer by the state of the key alone."""
        self._endpoint, self._app, self.opened = None, self._closed_app, False

    @property
    def unready(self) -> bool:
        """Whether it is yet to be opened."""
        return not self.opened and self.refused is None and self.member.status != "gone"

    def state(self) -> str:
        """Its state in one word, for metrics."""
        if self.refused is not None:
            return "refused"
        return "opening" if self.unready else self.member.status

    async def _unready(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await lifespan(receive, send)
        if self.refused is not None:
            raise Unavailable(f"this version cannot be served: {self.refused}", code=REPLICA_REFUSED)
        self.asked = True
        raise Unavailable(
            "this version is being verified; try again", code="unavailable", retry_after=RETRY_OPENING_S
        )


def engine_settings(pool: PoolSettings, member: PoolMember) -> EngineSettings:
    """What a member's endpoint is told, as if it had an engine of its own."""
    shared = pool.model_dump(include=_SHARED)
    own = member.model_dump(include=_OWN)
    return EngineSettings(**shared, **own, max_concurrent=min(pool.max_concurrent, member.max_concurrent))


_SHARED = set(PoolSettings.model_fields) & set(EngineSettings.model_fields) - {"max_concurrent"}
_OWN = set(PoolMember.model_fields) & set(EngineSettings.model_fields) - {"max_concurrent"}
