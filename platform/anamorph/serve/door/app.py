"""The door: the always-on application at ``/``, for every path that has no application of its own.

It is the way in for versions without a route, which scale to zero or share an engine: it
authenticates, then forwards. For everything else it says what is the matter with that
key version: gone, suspended, not there yet, restarting, or unknown. Who has no token for
a model wakes nothing and learns nothing.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable
from contextlib import suppress

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from anamorph.errors import ServiceError, Unavailable
from anamorph.serve.asgi.answers import JSON, not_found
from anamorph.serve.asgi.auth import OPERATOR, Caller, TokenVerifier, refused
from anamorph.serve.asgi.connection import lifespan, relative_path, while_connected
from anamorph.serve.asgi.forward import Forwarded
from anamorph.serve.asgi.middleware import Answers, BodyLimit, check_status, gone
from anamorph.serve.door.affinity import Affinity
from anamorph.serve.door.handles import Engines
from anamorph.serve.door.relay import Relay
from anamorph.serve.door.tally import Tally
from anamorph.wire.ids import LABEL
from anamorph.wire.serving import DoorState, Route

# Starting a replica takes seconds to minutes; a restart of a serving one takes seconds.
RETRY_PENDING_S = 5
RETRY_SERVING_S = 1
# What engines take by default; they have their own limit behind this one.
MAX_BODY_BYTES = 2**20
# All that an engine looks at. Cookies and the like end here.
FORWARDED_HEADERS = frozenset(
    {b"authorization", b"anamorph-key-id", b"content-type", b"traceparent", b"tracestate"}
)
_PATH = re.compile(
    rf"/(?P<tenant>{LABEL})/(?P<model>{LABEL})/v(?P<version>0|[1-9][0-9]{{0,8}})(?P<rest>/.*)?"
)

_Place = tuple[str, str, int]


class Door:
    """Answers by key state, and forwards what has no route of its own.

    Args:
        engines: the way to applications.
        clock: seconds since the epoch, for tokens.
        source: name of this process in usage reports, unique per start.
        broken: told the code of what ends an answer after its beginning, which has said 200.
    """

    def __init__(
        self,
        engines: Engines,
        clock: Callable[[], float] = time.time,
        source: str | None = None,
        broken: Callable[[str], None] = lambda _code: None,
    ) -> None:
        self._broken = broken
        self._engines = engines
        self._clock = clock
        self._source = source or uuid.uuid4().hex
        self._affinity = Affinity()
        self._tallies: dict[_Place, Tally] = {}
        self.reconfigure(DoorState())

    def reconfigure(self, state: DoorState) -> None:
        """Take over what the operator pushed."""
        self._verifier = TokenVerifier(state.jwks, self._clock)
        self._routes = {(r.tenant, r.model, r.version): r for r in state.routes}
        self._ended = {(e.tenant, e.model): e.up_to for e in state.ended}
        self._engines.keep({r.app for r in state.routes if r.app is not None})
        self._tallies = {p: t for p, t in self._tallies.items() if p in self._routes or t.in_flight}

    def app(self) -> ASGIApp:
        """The ASGI application."""
        return Answers(BodyLimit(self, MAX_BODY_BYTES), None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await lifespan(receive, send)
        if scope["type"] != "http":
            raise not_found()
        if relative_path(scope) == "/healthz":
            return await JSON({"status": "ok"})(scope, receive, send)
        request = Request(scope, receive, send)
        caller, route, path = self._admitted(request)
        if path in _BY_THE_DOOR:
            return await _BY_THE_DOOR[path](self._tally(route), caller, route)(scope, receive, send)
        _check_state(route)
        with suppress(ClientDisconnect):  # nobody is left to be answered
            await self._forward(request, send, route, path)
        return None

    def _admitted(self, request: Request) -> tuple[Caller, Route, str]:
        """Who asks, for which version, and the path below it.

        Raises:
            Unauthenticated: before anything else is looked at.
            NotFound: no such version.
            Forbidden, Gone, Unavailable: it has an application and a route of its own, or none.
        """
        caller = self._verifier.verify(request.headers)
        match = _PATH.fullmatch(relative_path(request.scope))
        if match is None:
            raise not_found()
        place = match["tenant"], match["model"], int(match["version"])
        if (caller.tenant, caller.model) != place[:2]:
            raise refused()
        route = self._routes.get(place)
        if route is None:
            raise self._unknown(place)
        if route.app is None:
            _check_state(route)
        return caller, route, match["rest"] or "/"

    def _unknown(self, place: _Place) -> ServiceError:
        """Why there is no route: it has ended, or never was."""
        ended = 1 <= place[2] <= self._ended.get(place[:2], 0)
        return gone() if ended else not_found()

    def _tally(self, route: Route) -> Tally:
        return self._tallies.setdefault((route.tenant, route.model, route.version), Tally(self._source))

    async def _forward(self, request: Request, send: Send, route: Route, path: str) -> None:
        deadline = asyncio.get_running_loop().time() + route.request_timeout_s
        body = await _body(request, deadline)
        assert route.app is not None  # noqa: S101 - _check_state has looked
        with self._tally(route).hold(route.max_held) as held:
            session = self._affinity.session(route.key_id, body) if route.affinity else ""
            pieces = self._engines.call(route.app, _forwarded(request, route, path, body), session)
            relay = Relay(send, self._tally(route), held, self._broken)
            await while_connected(request.receive, relay.run(pieces, deadline))


async def _body(request: Request, deadline: float) -> bytes:
    try:
        async with asyncio.timeout_at(deadline):
            return await request.body()
    except TimeoutError:
        raise Unavailable("the request took too long to arrive", code="timeout", retry_after=1) from None


def _forwarded(request: Request, route: Route, path: str, body: bytes) -> Forwarded:
    headers = tuple((n, v) for n, v in request.headers.raw if n.lower() in FORWARDED_HEADERS)
    return Forwarded(route.tenant, route.model, route.version, request.method, path, headers, body)


def _check_state(route: Route) -> None:
    """Refuse unless requests for this version are forwarded.

    Raises:
        Forbidden, Gone: suspended, ended.
        Unavailable: it has a route of its own, or will have: its application is starting.
    """
    check_status(route.status)
    if route.app is None:
        after = RETRY_PENDING_S if route.status == "pending" else RETRY_SERVING_S
        raise Unavailable(
            "this key version is being started; try again", code="unavailable", retry_after=after
        )


def _usage(tally: Tally, caller: Caller, _: Route) -> JSON:
    """Read while a version is suspended or gone, too: the operator waits for its last request."""
    if caller.subject != OPERATOR:
        raise refused()
    return JSON(tally.usage().model_dump(mode="json"))


def _health(_: Tally, __: Caller, route: Route) -> JSON:
    """Whether it may be asked, awake or not."""
    _check_state(route)
    return JSON({"status": "ok"})


def _metrics(_: Tally, __: Caller, ___: Route) -> JSON:
    # Pushed by the replicas over OTLP: whoever reads must not wake one, nor see other tenants' figures.
    raise not_found()


# Answered without the engine, which a reading would wake or hold.
_BY_THE_DOOR: dict[str, Callable[[Tally, Caller, Route], JSON]] = {
    "/usage": _usage,
    "/healthz": _health,
    "/metrics": _metrics,
}
