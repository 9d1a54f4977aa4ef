"""The placements that are compared, each as fleets of devices and the rule of who belongs where.

``plaintext`` is what would be without encryption: one replica of the base for all tenants.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import simpy
from benchmarks.simulation.fleet import Fleet, Key, Policy
from benchmarks.simulation.service import Inputs, Service

Name = Literal["plaintext", "dedicated", "zero", "shared"]
NAMES: tuple[Name, ...] = ("plaintext", "dedicated", "zero", "shared")
IDLE_S = 300.0


@dataclass(frozen=True)
class Site:
    """Fleets, and whose requests go where under which key."""

    fleets: Sequence[Fleet]
    of: Callable[[int], Fleet]
    key: Callable[[int, int], Key]

    @property
    def in_use(self) -> int:
        """Places taken, over all fleets."""
        return sum(fleet.in_use for fleet in self.fleets)


def dedicated_devices(inputs: Inputs, service: Service, tenants: int, spare: int) -> int:
    """Devices on which every tenant has a replica, and ``spare`` more find room."""
    return math.ceil((tenants + spare) / inputs.replicas_per_device(service))


@dataclass(frozen=True)
class Ground:
    """What a placement is built on.

    Args:
        shares: each tenant's part of the traffic.
        devices: how many there are.
    """

    env: simpy.Environment
    inputs: Inputs
    service: Service
    shares: Sequence[float]
    devices: int

    def fleet(self, policy: Policy, devices: int, places: int) -> Fleet:
        return Fleet(self.env, self.service, policy, devices, places)


def build(name: Name, ground: Ground) -> Site:
    """A placement of tenants on devices."""
    return _MAKERS[name](ground)


def _plaintext(ground: Ground) -> Site:
    """One replica per device; tenants are spread over them by their traffic."""
    home = spread(ground.shares, ground.devices)
    fleets = [ground.fleet(Policy(), 1, 1) for _ in range(ground.devices)]
    for fleet in fleets:
        fleet.settle((0, 0))
    return Site(fleets, lambda tenant: fleets[home[tenant]], lambda *_: (0, 0))


def _dedicated(ground: Ground) -> Site:
    fleet = ground.fleet(Policy(), ground.devices, ground.inputs.replicas_per_device(ground.service))
    for tenant in range(len(ground.shares)):
        fleet.settle((tenant, 0))
    return _one(fleet)


def _zero(ground: Ground) -> Site:
    places = ground.inputs.replicas_per_device(ground.service)
    return _one(ground.fleet(Policy(idle_s=IDLE_S), ground.devices, places))


def _shared(ground: Ground) -> Site:
    """An engine per device; each tenant belongs to one, whose host memory holds the busiest."""
    home = spread(ground.shares, ground.devices)
    policy = Policy(swap=True, host_replicas=ground.inputs.host_replicas(ground.service))
    slots = ground.inputs.slots(ground.service)
    fleets = [ground.fleet(policy, 1, slots) for _ in range(ground.devices)]
    for tenant, number in enumerate(home):
        fleets[number].keep_in_host((tenant, 0))
    return Site(fleets, lambda tenant: fleets[home[tenant]], _own)


def _one(fleet: Fleet) -> Site:
    return Site([fleet], lambda _: fleet, _own)


def _own(tenant: int, version: int) -> Key:
    return tenant, version


_MAKERS: dict[Name, Callable[[Ground], Site]] = {
    "plaintext": _plaintext,
    "dedicated": _dedicated,
    "zero": _zero,
    "shared": _shared,
}


def spread(shares: Sequence[float], devices: int) -> list[int]:
    """A device for each tenant: the busiest first, each to the one with least traffic so far."""
    loads = [(0.0, number) for number in range(devices)]
    home = [0] * len(shares)
    for tenant in sorted(range(len(shares)), key=lambda t: -shares[t]):
        load, number = heapq.heappop(loads)
        home[tenant] = number
        heapq.heappush(loads, (load + shares[tenant], number))
    return home
