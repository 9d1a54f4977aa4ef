"""``anamorph.serve.applications.door:build``: what Ray imports for the door."""

from __future__ import annotations

from typing import Any

from ray import serve
from starlette.types import ASGIApp

from anamorph import telemetry
from anamorph.serve.door.app import Door
from anamorph.serve.door.handles import Handles
from anamorph.serve.door.observed import Observed
from anamorph.wire.serving import DoorState

_SERVICE = "anamorph-door"


class DoorReplica:
    """The door as a Ray Serve replica."""

    def __init__(self) -> None:
        self._door = Door(Handles(), broken=lambda code: self._observed.broke(code))
        self._observed = Observed(self._door.app(), telemetry.setup(_SERVICE))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray once the constructor is through."""
        return self._observed

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over the routes that the operator pushed, without a restart."""
        state = DoorState.model_validate(user_config)
        self._door.reconfigure(state)
        self._observed.use(telemetry.setup(_SERVICE, otlp_endpoint=state.otlp_endpoint))


def build(args: dict[str, Any]) -> Any:
    """The Ray Serve application of the door; it takes no arguments."""
    if args:
        raise ValueError("the door takes no arguments; its state is its user_config")
    replica: Any = serve.deployment(
        serve.ingress()(DoorReplica),
        name="door",
        num_replicas=1,
        # All that is held and streamed by it counts: each version has its own, lower bound.
        max_ongoing_requests=10_000,
        health_check_period_s=2,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=5,
        ray_actor_options={"num_cpus": 0.1},
    )
    return replica.bind()
