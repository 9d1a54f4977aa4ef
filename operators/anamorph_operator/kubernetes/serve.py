"""The Serve applications of a RayService: read from Ray, written to Kubernetes.

KubeRay hands Ray whatever stands in the object, so nobody else may: there is one writer, and one object
that is written whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from anamorph import errors
from anamorph.serve.cluster.placement import Node
from anamorph_operator.kubernetes.catalogue import RAY_SERVICES, Object, Resource
from anamorph_operator.state import Application, Deployed


class Calls(Protocol):
    """What is needed of ``api.Api``."""

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Object: ...

    async def apply(self, body: Object, *, force: bool = False) -> Object: ...


class Reads(Protocol):
    """What is needed of ``ray_serve.RayServe``."""

    async def read(self) -> dict[str, Deployed]: ...

    async def nodes(self) -> tuple[Node, ...]: ...


class RayServiceServe:
    """The applications of one RayService.

    Args:
        ray: its dashboard.
        config: ``serveConfigV2`` for a list of applications.
        service: the whole object around it, as it is wanted now.
    """

    def __init__(
        self,
        api: Calls,
        ray: Reads,
        namespace: str,
        name: str,
        config: Callable[[tuple[Application, ...]], str],
        service: Callable[[str], Object],
    ) -> None:
        self._api = api
        self._ray = ray
        self._place = (namespace, name)
        self._config = config
        self._service = service

    async def read(self) -> dict[str, Deployed]:
        """Every application by name; none where there is no RayService yet: the first write makes it.

        Raises:
            Unavailable: Ray does not answer, or the API server.
        """
        try:
            return await self._ray.read()
        except errors.Unavailable:
            if await self._standing() is None:
                return {}
            raise

    async def write(self, applications: tuple[Application, ...]) -> None:
        """Replace the whole list, and whatever else of the object has changed.

        Raises:
            Unavailable: the API server does not answer.
            Conflict: somebody wrote the object meanwhile.
            Unprocessable, BadRequest, TooLarge: the object is refused.
        """
        await self._apply(self._config(applications), await self._standing())

    async def renew(self) -> None:
        """Write what else has changed of the object, and the list as it stands; nothing where there is none.

        Raises:
            as ``write``.
        """
        standing = await self._standing()
        if standing is not None:
            await self._apply(standing["spec"]["serveConfigV2"], standing)

    async def nodes(self) -> tuple[Node, ...]:
        """The nodes that are alive.

        Raises:
            Unavailable: Ray does not answer.
        """
        return await self._ray.nodes()

    async def _apply(self, config: str, standing: Object | None) -> None:
        body = self._service(config)
        if standing is not None:
            body = _at(body, standing["metadata"]["resourceVersion"])
        await self._api.apply(body, force=True)

    async def _standing(self) -> Object | None:
        try:
            return await self._api.get(RAY_SERVICES, *self._place)
        except errors.NotFound:
            return None


def _at(body: Object, version: str) -> Object:
    """The body as a change of the very version that was read."""
    return {**body, "metadata": {**body["metadata"], "resourceVersion": version}}
