"""``anamorph.serve.applications.engine:build``: what Ray imports for one (tenant, model, version).

The engine's replica is itself the HTTP ingress: one hop.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ray import serve
from starlette.types import ASGIApp

from anamorph import telemetry
from anamorph.serve.api.app import build_app
from anamorph.serve.api.endpoint import Endpoint
from anamorph.serve.applications import scaling
from anamorph.serve.asgi.forward import Begin, Forwarded, Served, respond
from anamorph.serve.cluster.placement import ray_resources
from anamorph.serve.engines.coldstart import ColdStart
from anamorph.serve.engines.loading import open_engine
from anamorph.serve.engines.ranks.layout import bundles, cores, own_ranks, placed_ranks
from anamorph.wire.serving import EngineSettings, KeyState

DEPLOYMENT = "engine"
# Requests that need no place in the engine's queue: health, metrics, models, refusals.
SPARE_REQUESTS = 64


class EngineReplica:
    """One replica process: verifies, loads, serves.

    Args:
        settings: ``EngineSettings`` as a dict, as Ray keeps them.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        parsed = EngineSettings.model_validate(settings)
        start = ColdStart()
        engine = open_engine(parsed, threads=cores(), start=start)
        observed = telemetry.setup("anamorph-engine", otlp_endpoint=parsed.otlp_endpoint)
        self._endpoint = Endpoint(parsed, engine, observed, start=start)
        self._app = build_app(self._endpoint)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray once the constructor is through."""
        return self._app

    async def forward(self, request: Forwarded) -> AsyncGenerator[Begin | Served | bytes, None]:
        """Answer a request that came by the door; closing the generator cancels it."""
        async with aclosing(respond(self._app, request)) as pieces:
            async for piece in pieces:
                yield piece

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over the key state that the operator pushed, without a restart."""
        self._endpoint.reconfigure(KeyState.model_validate(user_config))

    def check_health(self) -> None:
        """Raise when the engine does not compute; Ray then starts a new replica."""
        if not self._endpoint.engine.healthy():
            raise RuntimeError("the engine does not compute")


def _ranks(settings: EngineSettings) -> dict[str, Any]:
    """One placement group for all ranks of a replica, on as few nodes as hold it."""
    if placed_ranks(settings) == 1:
        return {}
    return {"placement_group_bundles": bundles(settings), "placement_group_strategy": "PACK"}


def _max_ongoing(settings: EngineSettings) -> int:
    if settings.autoscaling.max_replicas > 1:
        # Beyond what a replica computes at once, another one is better than its queue.
        return settings.max_concurrent
    # Ray's bound lies above ours: ours answers 429 in OpenAI's shape, Ray's would queue.
    return settings.max_concurrent + settings.max_queued + SPARE_REQUESTS


def deployment(settings: EngineSettings) -> Any:
    """The deployment of one application, not yet bound."""
    return serve.deployment(
        serve.ingress()(EngineReplica),
        name=DEPLOYMENT,
        **_ranks(settings),
        **scaling.options(settings.autoscaling),
        max_ongoing_requests=_max_ongoing(settings),
        **scaling.WATCHED,
        ray_actor_options={
            "num_cpus": 0.1 if settings.engine == "fake" else 1,
            # vLLM's own workers take the GPUs of the group, its replica none.
            "num_gpus": settings.num_gpus if own_ranks(settings) == placed_ranks(settings) else 0,
            "resources": ray_resources(settings),
        },
    )


def build(args: dict[str, Any]) -> Any:
    """The Ray Serve application of ``args``, which are ``EngineSettings``.

    Raises:
        pydantic.ValidationError: unknown or malformed settings; the application fails to deploy.
    """
    settings = EngineSettings.model_validate(args)
    return deployment(settings).bind(settings.model_dump(mode="json"))
