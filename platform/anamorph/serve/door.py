"""The door: the always-on application at ``/``, for every path that has no application of its own.

Ray would answer such a path with a bare text; the door says what is the matter with
that key version: gone, suspended, not there yet, restarting, or unknown.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

from ray import serve
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from anamorph.errors import Unavailable
from anamorph.serve.answers import JSON, not_found
from anamorph.serve.asgi import lifespan, relative_path
from anamorph.serve.auth import Caller, TokenVerifier, refused
from anamorph.serve.middleware import Answers, check_status
from anamorph.wire.ids import LABEL
from anamorph.wire.serving import DoorState, Route

# Starting a replica takes seconds to minutes; a restart of a serving one takes seconds.
RETRY_PENDING_S = 5
RETRY_SERVING_S = 1
_PATH = re.compile(rf"/(?P<tenant>{LABEL})/(?P<model>{LABEL})/v(?P<version>0|[1-9][0-9]{{0,8}})(/.*)?")

_Place = tuple[str, str, int]


class Door:
    """Answers by key state alone; it forwards nothing and knows no engine.

    Args:
        clock: seconds since the epoch, for tokens.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.reconfigure(DoorState())

    def reconfigure(self, state: DoorState) -> None:
        """Take over what the operator pushed."""
        self._verifier = TokenVerifier(state.jwks, self._clock)
        self._routes = {(r.tenant, r.model, r.version): r for r in state.routes}

    def app(self) -> ASGIApp:
        """The ASGI application."""
        return Answers(self, None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await lifespan(receive, send)
        if scope["type"] == "http" and relative_path(scope) == "/healthz":
            return await JSON({"status": "ok"})(scope, receive, send)
        raise self.refusal(relative_path(scope), Headers(scope=scope))

    def refusal(self, path: str, headers: Headers) -> Exception:
        """The error that a request is answered with; there is always one.

        Raises:
            ServiceError: likewise, where a check refuses by itself.
        """
        caller = self._verifier.verify(headers)
        match = _PATH.fullmatch(path)
        if match is None:
            return not_found()
        place = match["tenant"], match["model"], int(match["version"])
        _check_owner(caller, place)
        return _answer(self._routes.get(place))


def _check_owner(caller: Caller, place: _Place) -> None:
    if (caller.tenant, caller.model) != place[:2]:
        raise refused()


def _answer(route: Route | None) -> Exception:
    if route is None:
        return not_found()
    check_status(route.status)
    after = RETRY_PENDING_S if route.status == "pending" else RETRY_SERVING_S
    return Unavailable("this key version is being started; try again", code="unavailable", retry_after=after)


class DoorReplica:
    """The door as a Ray Serve replica."""

    def __init__(self) -> None:
        self._door = Door()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray once the constructor is through."""
        return self._door.app()

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over the routes that the operator pushed, without a restart."""
        self._door.reconfigure(DoorState.model_validate(user_config))


def build(args: dict[str, Any]) -> Any:
    """The Ray Serve application of the door; it takes no arguments."""
    if args:
        raise ValueError("the door takes no arguments; its state is its user_config")
    replica: Any = serve.deployment(
        serve.ingress()(DoorReplica),
        name="door",
        num_replicas=1,
        max_ongoing_requests=1000,
        health_check_period_s=2,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=5,
        ray_actor_options={"num_cpus": 0.1},
    )
    return replica.bind()
