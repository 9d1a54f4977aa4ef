"""What vLLM reports after each step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from anamorph.serve.engines.base import Load


class Watch:
    """Takes down how many sequences there are, and when a step last ended; vLLM calls its methods."""

    def __init__(self, vllm_config: Any, engine_indexes: Sequence[int]) -> None:  # noqa: ARG002 - vLLM's call
        self.load = Load(0, 0)
        self.last_step = time.monotonic()

    def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
        """Called in the event loop, once per step."""
        self.last_step = time.monotonic()
        if scheduler_stats is not None:
            waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self.load = Load(scheduler_stats.num_running_reqs, waiting)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""

    def log(self) -> None:
        """Nothing to say."""

    def record_admission_rejection(self, reason: str) -> None:
        """Never: admission is decided before vLLM sees a request."""


def watch_class() -> type[Watch]:
    """``Watch`` in the place of vLLM's Prometheus logger, whose metrics would go into our registry.

    It is one by name and nothing else: vLLM adds its own where none is given. Imports vLLM.
    """
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    return type("Watch", (Watch, PrometheusStatLogger), {})
