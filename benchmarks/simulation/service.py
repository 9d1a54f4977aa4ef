"""What a simulation is fed with: service times of models on one kind of device, and where each was got.

The file is JSON; ``benchmarks/service_times.py`` writes it, measured on this machine or computed
from a data sheet. Seconds and bytes throughout.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

LARGEST_BATCH = 256


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Device(_Frozen):
    """One accelerator with its share of a host.

    Args:
        memory_bytes: of the accelerator.
        host_bytes: host memory in which a shared engine keeps replicas that are in no slot.
        process_bytes: what one engine process takes besides weights and cache.
    """

    name: str
    memory_bytes: float = Field(gt=0)
    host_bytes: float = Field(ge=0)
    process_bytes: float = Field(ge=0)


class Service(_Frozen):
    """One base model on one device.

    Args:
        share: part of all tenants that use it.
        cache_bytes: of one replica's key-value cache.
        prefill_s: per token of a prompt.
        steps: pairs of (sequences in a batch, seconds of one decoding step).
        swap_s: a replica from host memory into a slot.
        read_s: a replica from the node's disk into host memory.
        fetch_s: a replica from the store to the node, verified.
        start_s: a new engine process until it can load.
        max_concurrent: sequences of one replica that are computed at a time.
    """

    name: str
    share: float = Field(gt=0, le=1)
    weight_bytes: float = Field(gt=0)
    cache_bytes: float = Field(ge=0)
    prefill_s: float = Field(ge=0)
    steps: tuple[tuple[int, float], ...]
    swap_s: float = Field(ge=0)
    read_s: float = Field(ge=0)
    fetch_s: float = Field(ge=0)
    start_s: float = Field(ge=0)
    max_concurrent: int = Field(default=16, ge=1, le=LARGEST_BATCH)

    @cached_property
    def step_s(self) -> list[float]:
        """Seconds of a step by sequences in the batch, from 0; between measured sizes a straight line."""
        sizes, seconds = zip(*sorted(self.steps), strict=True)
        return [0.0, *np.interp(range(1, LARGEST_BATCH + 1), sizes, seconds).tolist()]

    @property
    def cold_s(self) -> float:
        """From nothing to a replica that computes: process, store, disk, device."""
        return self.start_s + self.fetch_s + self.read_s + self.swap_s


class Inputs(_Frozen):
    """A device, the models on it, and for every figure where it comes from.

    Args:
        source: for each kind of figure the command that measured it, or what it was computed from.
    """

    device: Device
    services: tuple[Service, ...]
    source: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Inputs:
        """The file at ``path``; a ``ValidationError`` names what it lacks."""
        return cls.model_validate_json(path.read_text())

    def replicas_per_device(self, service: Service) -> int:
        """Dedicated engines, each a process of its own, that fit into a device's memory."""
        each = service.weight_bytes + service.cache_bytes + self.device.process_bytes
        return int(self.device.memory_bytes // each)

    def slots(self, service: Service) -> int:
        """Slots of one shared engine on a device."""
        free = self.device.memory_bytes - self.device.process_bytes
        return int(free // (service.weight_bytes + service.cache_bytes))

    def host_replicas(self, service: Service) -> int:
        """Replicas that a device's share of host memory holds."""
        return int(self.device.host_bytes // service.weight_bytes)
