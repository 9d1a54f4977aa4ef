"""Passing an engine's answer on to the client, whatever happens to the engine meanwhile."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from contextlib import aclosing, suppress

from starlette.types import Send

from anamorph.errors import ServiceError, Unavailable
from anamorph.serve.asgi.forward import Begin, Served
from anamorph.serve.door.handles import Pieces
from anamorph.serve.door.tally import Held, Tally
from anamorph.wire import problems

# For telling a client that its answer has broken off; it may have stopped reading.
LAST_WORDS_S = 2

_log = logging.getLogger("anamorph.serve")


class Relay:
    """One answer on its way.

    Args:
        send: of the request.
        tally: counts what crosses.
        held: told when the answer begins.
        broken: told the code of what ends an answer after its beginning.
    """

    def __init__(self, send: Send, tally: Tally, held: Held, broken: Callable[[str], None]) -> None:
        self._broken = broken
        self._send = send
        self._tally = tally
        self._held = held
        self._begin: Begin | None = None
        self._complete = False

    async def run(self, pieces: Pieces, deadline: float) -> None:
        """Pass all of ``pieces`` on, by ``deadline`` on the loop's clock.

        A failure after the beginning of a stream becomes its last event.

        Raises:
            Unavailable: it failed before it began, or where no event can say so: the
                connection is to be cut.
        """
        try:
            async with asyncio.timeout_at(deadline), aclosing(pieces):
                async for piece in pieces:
                    await self._pass(piece)
        except TimeoutError:
            await self._fail(Unavailable("the answer took too long", code="timeout", retry_after=1))
        except Exception as error:  # noqa: BLE001 - Ray raises anything when a process dies
            _log.warning("a forwarded request failed: %s", type(error).__name__)
            await self._fail(Unavailable("the engine failed; try again", code="unavailable", retry_after=1))
        else:
            if not self._complete:
                await self._fail(Unavailable("the answer broke off", code="unavailable", retry_after=1))

    async def _pass(self, piece: Begin | Served | bytes) -> None:
        if isinstance(piece, bytes):
            await self._body(piece)
        elif isinstance(piece, Served):
            self._tally.count(piece.tokens)
            if piece.last:
                self._complete = True
                await self._body(b"", more=False)
        else:
            self._begin = piece
            self._held.begun()
            await self._send(
                {"type": "http.response.start", "status": piece.status, "headers": list(piece.headers)}
            )
            await self._body(piece.body)

    async def _body(self, body: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _fail(self, error: ServiceError) -> None:
        if self._begin is not None and error.code is not None:
            self._broken(error.code)
        if self._begin is None or not _is_stream(self._begin):
            raise error
        event = json.dumps(problems.openai_error(error), separators=(",", ":"))
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await self._body(b"data: " + event.encode() + b"\n\n", more=False)


def _is_stream(begin: Begin) -> bool:
    kinds = [value for name, value in begin.headers if name.lower() == b"content-type"]
    return bool(kinds) and kinds[0].startswith(b"text/event-stream")
