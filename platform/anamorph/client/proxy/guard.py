"""Who may call the proxy: programs on this machine, and no page of a foreign site in its browser.

A page can make a browser send requests to a loopback address, directly or by
pointing a name of its own at it (DNS rebinding). The first shows in ``Origin``, the
second in ``Host``; both are refused unless they name this machine.
"""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from anamorph.client.proxy.settings import is_loopback
from anamorph.client.proxy.shapes import error_response
from anamorph.errors import Forbidden, ServiceError, Unauthenticated


class Guard:
    """ASGI middleware that answers 403 or 401 before a request reaches the routes."""

    def __init__(self, app: ASGIApp, *, local_api_key: str | None) -> None:
        self._app = app
        self._key = local_api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or answer it."""
        refusal = self._refuse(Headers(scope=scope)) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await error_response(refusal)(scope, receive, send)

    def _refuse(self, headers: Headers) -> ServiceError | None:
        if not _names_this_machine("//" + headers.get("host", "")):
            return Forbidden("the Host header does not name this machine", code="foreign_host")
        origin = headers.get("origin")
        if origin is not None and not _names_this_machine(origin):
            return Forbidden("pages of other sites may not use the proxy", code="foreign_origin")
        if self._key is not None and not _bears(headers.get("authorization", ""), self._key):
            return Unauthenticated("send the proxy's own API key as bearer token", code="invalid_api_key")
        return None


def _names_this_machine(url: str) -> bool:
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False


def _bears(authorization: str, key: str) -> bool:
    scheme, _, given = authorization.partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), key.encode())
