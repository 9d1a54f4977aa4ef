"""Around every request: a bound on its body, and ``no-store`` on its answer."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anamorph import errors
from anamorph_keysvc import deadline, problems


class NoStore:
    """Forbids caches to keep anything: some answers are secrets, and none is worth caching."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and mark the answer."""

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"cache-control", b"no-store")]
            await send(message)

        await self.app(scope, receive, marked if scope["type"] == "http" else send)


class BodyLimit:
    """Refuses bodies that are too large, announced or not.

    FastAPI has such a limit of its own, which answers in plain text.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 413, or pass the request on and count what arrives."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdigit() and int(announced) > self.limit:
            too_large = errors.TooLarge(f"a body has at most {self.limit} bytes", code="body_too_large")
            await problems.answer(too_large)(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.limit:
                # The one exception that the framework lets through while it reads a body.
                raise HTTPException(413)
            return message

        await self.app(scope, counted, send)


class Deadline:
    """Gives each request one deadline for all that it waits for."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self.app = app
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on within its deadline; the start of the app has none."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        with deadline.within(self.seconds):
            await self.app(scope, receive, send)
