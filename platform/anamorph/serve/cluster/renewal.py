"""A renewed certificate, taken over by the server that asks: Ray's HTTP proxy reads its own only once.

Ray gives no way to its server. But a server hands each request something to send with, which
holds the connection, which knows the context that all new connections begin with.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from anamorph.wire.certificate import REFRESH_S, CertificateFiles

_log = logging.getLogger(__name__)

FOLDER = "ANAMORPH_SERVE_TLS"
"""Variable that names the folder with ``tls.crt`` and ``tls.key``, which Serve's options name, too."""


class Renewal:
    """Looks at the files with a request, at most once a minute; a pod's probes are requests enough.

    Args:
        app: what answers.
        folder: with ``tls.crt`` and ``tls.key``.
        clock: seconds that only grow.

    Raises:
        OSError: there is no certificate.
    """

    def __init__(self, app: ASGIApp, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._clock = app, clock
        self._files = CertificateFiles(folder / "tls.crt", folder / "tls.key")
        self._next = clock() + REFRESH_S

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._clock() >= self._next:
            self._next = self._clock() + REFRESH_S
            self._look(scope, send)
        await self._app(scope, receive, send)

    def _look(self, scope: Scope, send: Send) -> None:
        if scope.get("scheme") != "https":
            return
        context = _context(send)
        if context is None:
            _log.warning("this server does not show its certificate: restart the pod when it is renewed")
            return
        self._files.renew(context)


def _context(send: Send) -> ssl.SSLContext | None:
    """The server's own, where it is uvicorn: ``send`` is a method of what holds the connection."""
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    context = None if transport is None else transport.get_extra_info("sslcontext")
    return context if isinstance(context, ssl.SSLContext) else None
