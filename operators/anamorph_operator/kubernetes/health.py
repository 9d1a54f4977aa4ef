"""``/livez`` and ``/metrics``, from the first moment on: who waits for the lease is alive, too."""

from __future__ import annotations

import asyncio
import logging
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from anamorph.telemetry import Telemetry
from anamorph_operator.kubernetes.lease import Clock, monotonic

_log = logging.getLogger(__name__)
# How often the event loop shows that it goes on, and how long it may fail to: it never blocks for seconds.
_BEAT_S, _DEAD_S = 5.0, 60.0


class Health:
    """A small server in threads of its own, so that a loop that hangs cannot hide it.

    Args:
        address: host and port; port 0 takes a free one.
    """

    def __init__(self, address: tuple[str, int], telemetry: Telemetry, now: Clock = monotonic) -> None:
        self._now = now
        self._telemetry = telemetry
        self._beat_at: float | None = None
        self._server = ThreadingHTTPServer(address, self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    async def beat(self) -> None:
        """Show that the event loop goes on, until cancelled."""
        try:
            while True:
                self._beat_at = self._now()
                await asyncio.sleep(_BEAT_S)
        finally:
            self._beat_at = None

    def alive(self) -> bool:
        """Whether the loop goes on, if there is one."""
        return self._beat_at is None or self._now() < self._beat_at + _DEAD_S

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, path: str) -> tuple[HTTPStatus, bytes]:
        """What is answered to a ``GET``."""
        if path == "/livez":
            return (HTTPStatus.OK, b"ok") if self.alive() else (HTTPStatus.SERVICE_UNAVAILABLE, b"stuck")
        if path == "/metrics":
            return HTTPStatus.OK, self._telemetry.prometheus()
        return HTTPStatus.NOT_FOUND, b""

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        health = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                status, body = health.answer(self.path)
                self.send_response(status)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
                """Probes are not worth a line each."""

        return Handler
