"""A request that reaches an engine through the door: what crosses between the two processes.

The door hands a ``Forwarded`` to the ``forward`` method of an application's replica, by
Ray's handle and as a stream. The replica runs its own ASGI application on it, with all
of its checks, and answers in this order::

    Begin · (bytes | Served)* · Served(last=True)

Bytes are passed on as they are. A stream without its last ``Served`` has broken off.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from anamorph.errors import Unavailable
from anamorph.wire.serving import route_prefix

Headers = tuple[tuple[bytes, bytes], ...]
# Where an application finds the meter of a forwarded request.
METER = "anamorph.meter"
# Tokens after which the door is told in the middle of a stream; a caller that hangs up can
# leave fewer than that uncounted.
REPORT_TOKENS = 32


@dataclass(frozen=True)
class Forwarded:
    """One request as the door passes it on, after its own checks.

    Args:
        path: below the version's route, for example ``/v1/completions``.
        headers: names in lower case, as in ASGI.
        body: the whole of it.
    """

    tenant: str
    model: str
    version: int
    method: str
    path: str
    headers: Headers
    body: bytes

    def scope(self) -> Scope:
        """The ASGI scope, as if the version had its route and the request had come by it."""
        root = route_prefix(self.tenant, self.model, self.version)
        path = root + self.path
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": root,
            "headers": list(self.headers),
            "client": None,
            "server": None,
        }


@dataclass(frozen=True)
class Begin:
    """Status and headers of an answer, with the first bytes of its body."""

    status: int
    headers: Headers
    body: bytes


@dataclass(frozen=True)
class Served:
    """Ids that crossed the wire since the last report; ``last`` once the answer is complete."""

    tokens: int
    last: bool = False


class Meter:
    """Counts the ids of one forwarded request."""

    def __init__(self) -> None:
        self.tokens = 0

    def count(self, tokens: int) -> None:
        self.tokens += tokens

    def take(self) -> int:
        """What was counted since the last call."""
        taken, self.tokens = self.tokens, 0
        return taken


def count(scope: Scope, tokens: int) -> None:
    """Tell the door of ids, if it is by the door that the request came."""
    meter = scope.get(METER)
    if isinstance(meter, Meter):
        meter.count(tokens)


async def respond(app: ASGIApp, request: Forwarded) -> AsyncGenerator[Begin | Served | bytes, None]:
    """Run an application on a request; closing the generator is the client's hanging up.

    Raises:
        Unavailable: the application ended before its answer did.
    """
    exchange, meter = _Exchange(request.body), Meter()
    task = asyncio.ensure_future(app({**request.scope(), METER: meter}, exchange.receive, exchange.send))
    task.add_done_callback(exchange.end)
    try:
        yield await exchange.begin()
        while exchange.unfinished:
            if meter.tokens >= REPORT_TOKENS:
                yield Served(meter.take())
            yield await exchange.chunk()
        await task
        yield Served(meter.take(), last=True)
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


class _Exchange:
    """The two channels of an ASGI application, and what it has sent so far."""

    def __init__(self, body: bytes) -> None:
        self._request: Message | None = {"type": "http.request", "body": body, "more_body": False}
        self._sent: asyncio.Queue[Message | None] = asyncio.Queue()
        self.unfinished = True

    async def receive(self) -> Message:
        request, self._request = self._request, None
        if request is None:
            # Nothing follows the body: who hangs up cancels the application as a whole.
            await asyncio.get_running_loop().create_future()
        return request or {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self._sent.put_nowait(message)

    def end(self, _: asyncio.Future[Any]) -> None:
        """The application has returned, or raised."""
        self._sent.put_nowait(None)

    async def begin(self) -> Begin:
        """Status, headers and the first bytes: one message for what nearly always comes together."""
        start = await self._next()
        headers = tuple((bytes(name), bytes(value)) for name, value in start.get("headers", ()))
        return Begin(int(start["status"]), headers, await self.chunk())

    async def chunk(self) -> bytes:
        """All of the body that is there, at least one message; a caller that lags gets fewer, larger ones."""
        parts = [self._part(await self._next())]
        while self.unfinished and not self._sent.empty():
            parts.append(self._part(await self._next()))
        return b"".join(parts)

    def _part(self, message: Message) -> bytes:
        self.unfinished = bool(message.get("more_body", False))
        return bytes(message.get("body", b""))

    async def _next(self) -> Message:
        message = await self._sent.get()
        if message is None:
            raise Unavailable("the answer broke off", code="unavailable", retry_after=1)
        return message
