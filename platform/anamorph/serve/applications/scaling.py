"""How many replicas there are, which of several answers, how they begin and end: Ray Serve's own options."""

from __future__ import annotations

from typing import Any, Final

from anamorph.wire.admin import Autoscaling

# Ray averages over this long; it wants more than 10 s, the interval at which callers report.
LOOK_BACK_S = 10.5
AFFINITY_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"

# How every engine's process is begun, watched and ended.
WATCHED: Final[dict[str, Any]] = {
    # A replica that is refused once is refused again; the operator decides what follows.
    "max_constructor_retry_count": 2,
    "health_check_period_s": 2,
    "health_check_timeout_s": 15,
    # The operator deletes an application only when nothing is in flight.
    "graceful_shutdown_wait_loop_s": 0.2,
    "graceful_shutdown_timeout_s": 5,
}


def options(autoscaling: Autoscaling) -> dict[str, Any]:
    """Options of ``serve.deployment``.

    ``initial_replicas`` is never set: Ray goes back to it whenever key state is pushed,
    which would wake what is idle and stop what is busy.
    """
    if autoscaling.single:
        return {"num_replicas": 1}
    config = {
        "min_replicas": autoscaling.min_replicas,
        "max_replicas": autoscaling.max_replicas,
        "target_ongoing_requests": autoscaling.target_ongoing_requests,
        "look_back_period_s": LOOK_BACK_S,
        # The average over the look-back is pause enough; from none to one there is none at all.
        "upscale_delay_s": 0.0,
        "downscale_delay_s": max(0.0, autoscaling.idle_s - LOOK_BACK_S),
    }
    return {"autoscaling_config": config, **_routing(autoscaling.max_replicas)}


def _routing(replicas: int) -> dict[str, Any]:
    """Requests of one session to one replica, and to the others in turn when it is full."""
    if replicas == 1:
        return {}
    kwargs = {"num_fallback_replicas": replicas - 1}
    return {
        "request_router_config": {
            "request_router_class": AFFINITY_ROUTER,
            "request_router_kwargs": kwargs,
        }
    }
