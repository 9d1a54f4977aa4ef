"""``anamorph.serve.applications.pool:build``: what Ray imports for a pool, an engine that tenants share.

It has no route. The door forwards to it, and the member's own endpoint checks token, key
state and key id again.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ray import serve

from anamorph import telemetry
from anamorph.errors import SetupError
from anamorph.replica import Held
from anamorph.serve.applications import scaling
from anamorph.serve.asgi.forward import Begin, Forwarded, Served, respond
from anamorph.serve.cluster.placement import ray_resources
from anamorph.serve.engines.loading import hold
from anamorph.serve.engines.ranks.layout import cores
from anamorph.serve.slots.base import Backend
from anamorph.serve.slots.fake import FakeBackend
from anamorph.serve.slots.pool import Pool
from anamorph.wire.serving import PoolMember, PoolSettings, PoolState

DEPLOYMENT = "pool"
# Far above what all members together may queue: our bounds answer 429, Ray's would make them wait.
MAX_ONGOING = 100_000


class PoolReplica:
    """The one process of a pool.

    Args:
        settings: ``PoolSettings`` as a dict, as Ray keeps them.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        parsed = PoolSettings.model_validate(settings)
        observed = telemetry.setup("anamorph-engine", otlp_endpoint=parsed.otlp_endpoint)
        self._pool = Pool(parsed, open_backend(parsed), observed)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over the members that the operator pushed; who was there is not disturbed."""
        self._pool.reconfigure(PoolState.model_validate(user_config))

    async def forward(self, request: Forwarded) -> AsyncGenerator[Begin | Served | bytes, None]:
        """Answer a request that came by the door; closing the generator cancels it."""
        app = self._pool.app(request.tenant, request.model, request.version)
        async with aclosing(respond(app, request)) as pieces:
            async for piece in pieces:
                yield piece

    def check_health(self) -> None:
        """Raise when the engine does not compute; Ray then starts a new replica."""
        if not self._pool.engine.healthy():
            raise RuntimeError("the engine does not compute")


def open_backend(settings: PoolSettings, *, threads: int | None = None) -> Backend:
    """The slots of a pool, empty.

    Args:
        settings: of the pool.
        threads: for arithmetic on the CPU; by default ``ANAMORPH_ENGINE_THREADS``, else all cores.

    Raises:
        SetupError: the engine has no slots.
    """

    def held(member: PoolMember) -> Held:
        return hold(
            member.replica,
            settings.cache,
            public_key=member.public_key,
            key_id=member.key_id,
            manifest_sha256=member.manifest_sha256,
        )

    if settings.engine == "fake":
        return FakeBackend(settings, held)
    if settings.engine != "torch":
        raise SetupError(f"the engine {settings.engine} has no slots: a pool runs on torch")
    # Imported here: torch takes seconds, and the fake engine does without.
    import torch

    from anamorph.serve.engines.torch import Capacity
    from anamorph.serve.slots.torch import TorchBackend

    torch.set_num_threads(threads or cores())
    return TorchBackend(settings, Capacity.of(settings), held)


def build(args: dict[str, Any]) -> Any:
    """The Ray Serve application of one pool, whose arguments are ``PoolSettings``.

    Raises:
        pydantic.ValidationError: unknown or malformed settings; the application fails to deploy.
    """
    settings = PoolSettings.model_validate(args)
    replica: Any = serve.deployment(
        PoolReplica,
        name=DEPLOYMENT,
        # The slots and who is in them are this one process's to know.
        num_replicas=1,
        max_ongoing_requests=MAX_ONGOING,
        **scaling.WATCHED,
        ray_actor_options={
            "num_cpus": 1 if settings.engine == "torch" else 0.1,
            "num_gpus": settings.num_gpus,
            "resources": ray_resources(settings),
        },
    )
    return replica.bind(settings.model_dump(mode="json"))
