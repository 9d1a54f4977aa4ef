"""The engine as a Ray Serve deployment: its replica is itself the HTTP ingress, one hop."""

from __future__ import annotations

import os
from typing import Any

from ray import serve
from starlette.types import ASGIApp

from anamorph import telemetry
from anamorph.serve.endpoint import Endpoint
from anamorph.serve.loading import open_engine
from anamorph.serve.openai_api import build_app
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
        engine = open_engine(parsed, threads=_threads())
        observed = telemetry.setup("anamorph-engine", otlp_endpoint=parsed.otlp_endpoint)
        self._endpoint = Endpoint(parsed, engine, observed)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray once the constructor is through."""
        return build_app(self._endpoint)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over the key state that the operator pushed, without a restart."""
        self._endpoint.reconfigure(KeyState.model_validate(user_config))

    def check_health(self) -> None:
        """Raise when the engine does not compute; Ray then starts a new replica."""
        if not self._endpoint.engine.healthy():
            raise RuntimeError("the engine does not compute")


def _threads() -> int:
    # Ray sets OMP_NUM_THREADS to a replica's share of logical CPUs, which says nothing of cores.
    return int(os.environ.get("ANAMORPH_ENGINE_THREADS", len(os.sched_getaffinity(0))))


def deployment(settings: EngineSettings) -> Any:
    """The deployment of one application, not yet bound."""
    return serve.deployment(
        serve.ingress()(EngineReplica),
        name=DEPLOYMENT,
        num_replicas=1,
        # Ray's bound lies above ours: ours answers 429 in OpenAI's shape, Ray's would queue.
        max_ongoing_requests=settings.max_concurrent + settings.max_queued + SPARE_REQUESTS,
        # A replica that is refused once is refused again; the operator decides what follows.
        max_constructor_retry_count=2,
        health_check_period_s=2,
        health_check_timeout_s=15,
        # The operator deletes an application only when nothing is in flight.
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=5,
        ray_actor_options={
            "num_cpus": 1 if settings.engine == "torch" else 0.1,
            "num_gpus": settings.num_gpus,
        },
    )
