"""Two things every ASGI application here needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.types import Receive, Send


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
