"""Ray's own error answers, put into OpenAI's shape inside Ray's HTTP proxy.

When a replica is dead, restarting or slow, the proxy answers by itself, in plain
text. ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=anamorph.serve.cluster.proxy:middlewares``
(set by ``local``, and in Ray's pods) puts this in front of it. An error answer of ours is JSON; one
that is not comes from Ray and is replaced. Where Serve uses TLS, a renewed certificate is taken over.
"""

from __future__ import annotations

import os
from pathlib import Path

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anamorph import errors
from anamorph.serve.asgi.answers import not_found, refusal
from anamorph.serve.cluster.renewal import FOLDER, Renewal

# Ray's own health and routes pages.
_INTERNAL = "/-/"
_RETRY_AFTER_S = 1


def middlewares() -> list[Middleware]:
    """What Ray's proxy asks for, by the environment variable above."""
    folder = os.environ.get(FOLDER)
    renewing = [] if folder is None else [Middleware(Renewal, folder=Path(folder))]
    # The last is asked first, with what the server itself gives to send with.
    return [Middleware(OpenAIShape), *renewing]


class OpenAIShape:
    """Replaces error answers that are not JSON: 4xx of Ray's router by 404, all else by 503.

    A replica that dies while it answers is an exception here. Before the answer began
    that is a 503 too; after, the connection is cut and the client sees an incomplete answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(_INTERNAL):
            return await self._app(scope, receive, send)
        started = replaced = False

        async def reshaped(message: Message) -> None:
            nonlocal started, replaced
            if message["type"] == "http.response.start":
                started, replaced = True, _is_rays(message)
                if replaced:
                    return await _answer(message["status"])(scope, receive, send)
            if not replaced:
                await send(message)
            return None

        try:
            await self._app(scope, receive, reshaped)
        except Exception:
            if started:
                raise
            await _answer(500)(scope, receive, send)
        return None


def _is_rays(message: Message) -> bool:
    kind = Headers(raw=message.get("headers", [])).get("content-type", "")
    return message["status"] >= 400 and not kind.startswith("application/json")


def _answer(status: int) -> ASGIApp:
    if status in (404, 405):
        return refusal(not_found())
    return refusal(
        errors.Unavailable(
            "this endpoint is restarting; try again", code="unavailable", retry_after=_RETRY_AFTER_S
        )
    )
