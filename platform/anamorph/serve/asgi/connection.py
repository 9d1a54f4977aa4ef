"""What every ASGI application here does with a connection: path, start and end, the client's leaving."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.types import Receive, Send

T = TypeVar("T")


def relative_path(scope: Mapping[str, Any]) -> str:
    """Path below the application's route prefix, which Ray passes as ``root_path``."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) if root and path.startswith(root + "/") else path


async def lifespan(receive: Receive, send: Send) -> None:
    """Answer ASGI's start-up and shutdown messages: there is nothing to do at either."""
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Run ``work`` until it is done or the client is gone, which cancels it; then None.

    Only for requests whose body has been read: from then on the next message is the
    disconnect.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for one in (task, watcher):
            one.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await one


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
