"""The door's way to engines: Ray Serve's handles, one for each application in use."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from ray.serve.handle import DeploymentHandle

from anamorph.errors import Unavailable
from anamorph.serve.asgi.forward import Begin, Forwarded, Served
from anamorph.wire.serving import deployment_name

# Of ``EngineReplica`` and ``PoolReplica``.
METHOD = "forward"
# Each handle listens for its application's replicas: those that are not used are closed.
MOST_HANDLES = 512

Pieces = AsyncGenerator[Begin | Served | bytes, None]


class Engines(Protocol):
    """How the door reaches applications."""

    def call(self, app: str, request: Forwarded, session: str) -> Pieces:
        """Pass a request on; closing the generator cancels it.

        Raises:
            Exception: whatever befell the replica, which is told by type only.
        """
        ...

    def keep(self, apps: set[str]) -> None:
        """Forget all other applications."""
        ...


class Handles:
    """Engines on Ray; a call waits for as long as an application has no replica."""

    def __init__(self) -> None:
        self._handles: OrderedDict[str, DeploymentHandle[Any]] = OrderedDict()
        self._calls: dict[str, int] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def call(self, app: str, request: Forwarded, session: str) -> Pieces:
        """See ``Engines.call``."""
        self._calls[app] = self._calls.get(app, 0) + 1
        options = self._handle(app).options(method_name=METHOD, stream=True, session_id=session)
        response: Any = options.remote(request)
        complete = False
        try:
            async for piece in response:
                yield piece
            complete = True
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            # The call was cancelled at its other end: the replica is being stopped.
            raise Unavailable("the engine was stopped", code="unavailable", retry_after=1) from None
        finally:
            self._release(app)
            if not complete:
                response.cancel()

    def keep(self, apps: set[str]) -> None:
        """See ``Engines.keep``; a call that runs goes on."""
        for app in [known for known in self._handles if known not in apps]:
            self._close(self._handles.pop(app))

    def _handle(self, app: str) -> DeploymentHandle[Any]:
        if app not in self._handles:
            self._handles[app] = DeploymentHandle(deployment_name(app), app)
        self._handles.move_to_end(app)
        if len(self._handles) > MOST_HANDLES:
            self._drop_oldest_idle()
        return self._handles[app]

    def _drop_oldest_idle(self) -> None:
        idle = next((app for app in self._handles if app not in self._calls), None)
        if idle is not None:
            self._close(self._handles.pop(idle))

    def _release(self, app: str) -> None:
        self._calls[app] -= 1
        if not self._calls[app]:
            del self._calls[app]

    def _close(self, handle: DeploymentHandle[Any]) -> None:
        if handle.is_initialized:
            closing = handle.shutdown_async()  # type: ignore[no-untyped-call]
            task = asyncio.get_running_loop().create_task(closing)
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
