"""Tensor parallel: continuous batching on every rank, requests and tokens from rank 0 alone.

The manager of rank 0 takes requests and sends them to the others through its own
collectives; each then takes the same steps. Which token comes next is decided by rank 0
too: options of a request stay there, and no rank depends on drawing the same as another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from anamorph.serve.engines.sampler import Row, Sampler, choose
from anamorph.serve.engines.torch import Capacity, TorchEngine, manager_of


class SharedSampler(Sampler):
    """Rank 0 chooses every token, the others learn it.

    Args:
        clock: monotonic seconds.
        group: of the ranks that share every layer.
    """

    def __init__(self, clock: Callable[[], float], group: Any) -> None:
        super().__init__(clock)
        self._group = group
        self._leads = dist.get_rank(group) == 0

    def choose(self, scores: torch.Tensor, rows: Sequence[Row | None]) -> torch.Tensor:
        if self._leads:
            chosen = choose(scores, rows)
        else:
            chosen = torch.empty(scores.shape[0], dtype=torch.int64, device=scores.device)
        dist.broadcast(chosen, group=self._group, group_src=0)
        return chosen


def lead(model: Any, capacity: Capacity, alive: Callable[[], bool]) -> TorchEngine:
    """The engine of rank 0; ``alive`` says whether the other ranks live."""
    return TorchEngine(model, capacity, sampler=_sampler(model, time.monotonic), alive=alive)


def follow(model: Any, capacity: Capacity) -> None:
    """Take part in rank 0's steps until it stops.

    Raises:
        RuntimeError: a collective failed or timed out: another rank is gone or hangs.
    """
    manager = manager_of(model, capacity, _sampler(model, time.monotonic))
    manager.start()
    manager.join(time.perf_counter())
    if manager.background_thread_status.fatal_error is not None:
        raise RuntimeError("this rank can no longer reach the others")


def _sampler(model: Any, clock: Callable[[], float]) -> SharedSampler:
    return SharedSampler(clock, model._device_mesh["tp"].get_group())
