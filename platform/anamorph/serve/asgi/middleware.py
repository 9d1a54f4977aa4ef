"""What stands in front of an engine, outermost first, each a plain ASGI callable.

    Answers → BodyLimit → Authentication → KeyStatus → KeyIdHeader → routes

Each refuses by raising; ``Answers`` alone writes error answers. The order is a
promise: who is not authenticated learns nothing about the state of a key.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anamorph import errors
from anamorph.serve.asgi.answers import internal_error, refusal
from anamorph.serve.asgi.auth import OPERATOR, Caller, TokenVerifier, refused
from anamorph.serve.asgi.connection import relative_path
from anamorph.wire.ids import KeyId
from anamorph.wire.inference import KEY_ID_HEADER
from anamorph.wire.serving import EngineSettings, KeyState

OPEN_PATHS = frozenset({"/healthz", "/metrics"})
# Read while a version is suspended or gone: the operator waits for its last request.
OPERATOR_PATHS = frozenset({"/usage"})
NEED_KEY_ID = frozenset({"/v1/completions"})

_log = logging.getLogger("anamorph.serve")


class Answers:
    """Turns whatever is raised inside into OpenAI's error shape; logs types and places, never values."""

    def __init__(self, app: ASGIApp, key_id: str | None) -> None:
        self._app = app
        self._key_id = key_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started = False

        async def noting(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except errors.ServiceError as error:
            if not started:
                await refusal(error, self._key_id)(scope, receive, send)
        except Exception as error:  # noqa: BLE001 - the last resort before Ray's own text answer
            _log.error("unexpected %s at %s", type(error).__name__, _place(error))
            if not started:
                await internal_error()(scope, receive, send)
        return None


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "?" if trace is None else f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"


class BodyLimit:
    """413 for a body over the limit: by its announced length, else while it is read."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        announced = Headers(scope=scope).get("content-length", "0") if scope["type"] == "http" else "0"
        if not announced.isdecimal() or int(announced) > self._limit:
            raise self._too_large()
        read = 0

        async def counting() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limit:
                raise self._too_large()
            return message

        await self._app(scope, counting, send)

    def _too_large(self) -> errors.TooLarge:
        return errors.TooLarge(f"a request's body is {self._limit} bytes at most", code="body_too_large")


class Authentication:
    """401 unless the token is valid and speaks for this tenant and model."""

    def __init__(self, app: ASGIApp, verifier: Callable[[], TokenVerifier], settings: EngineSettings) -> None:
        self._app = app
        self._verifier = verifier
        self._tenant = settings.tenant
        self._model = settings.model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and relative_path(scope) not in OPEN_PATHS:
            caller = self._verifier().verify(Headers(scope=scope))
            self._check(caller, relative_path(scope))
        await self._app(scope, receive, send)

    def _check(self, caller: Caller, path: str) -> None:
        if (caller.tenant, caller.model) != (self._tenant, self._model):
            raise refused()
        if path in OPERATOR_PATHS and caller.subject != OPERATOR:
            raise refused()


class KeyStatus:
    """403 while the key version is suspended, 410 once it is gone."""

    def __init__(self, app: ASGIApp, state: Callable[[], KeyState]) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and relative_path(scope) not in OPEN_PATHS | OPERATOR_PATHS:
            check_status(self._state().status)
        await self._app(scope, receive, send)


def check_status(status: str) -> None:
    """Refuse unless a version is in use.

    Raises:
        Forbidden: suspended.
        Gone: retired, revoked or destroyed.
    """
    if status == "suspended":
        raise errors.Forbidden("this key version is suspended; it may be resumed", code="suspended")
    if status == "gone":
        raise gone()


def gone() -> errors.Gone:
    """The refusal of a version that is retired, revoked or destroyed."""
    return errors.Gone("this key version is no longer served; ask for the current one", code="key_gone")


class KeyIdHeader:
    """Completions must name the key that their ids are encrypted under: 400 without, 409 with another."""

    def __init__(self, app: ASGIApp, key_id: str | None) -> None:
        self._app = app
        self._key_id = key_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and relative_path(scope) in NEED_KEY_ID:
            self._check(Headers(scope=scope).get(KEY_ID_HEADER))
        await self._app(scope, receive, send)

    def _check(self, named: str | None) -> None:
        if named is None:
            if self._key_id is not None:
                raise errors.BadRequest(f"the header {KEY_ID_HEADER} is missing", code="missing_key_id")
            return
        try:
            KeyId.parse(named)
        except errors.InvalidId as error:
            raise errors.BadRequest(f"{KEY_ID_HEADER}: {error}", code="invalid_value") from None
        if named != self._key_id:
            raise errors.Conflict("the ids are encrypted under another key than this one", code="wrong_key")
