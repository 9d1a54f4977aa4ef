"""Devices with places for replicas: which are resident, which leave, and who waits.

A key is ``(tenant, version)``. Three policies cover the placements: replicas that never leave
(dedicated), that leave after some time without a request (scaled to zero), and that leave when
another needs their place, the least recently used first (slots of a shared engine).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import simpy
from benchmarks.simulation.device import Computer, Replica
from benchmarks.simulation.service import Service

Key = tuple[int, int]
# How long others wait before a replica that is never idle is let finish.
TURN_S = 1.0


@dataclass(frozen=True)
class Policy:
    """How replicas come and go.

    Args:
        swap: out of host memory on demand; otherwise by a cold start.
        idle_s: seconds without a request after which a replica leaves; None: it stays.
        host_replicas: that host memory holds, where replicas are swapped.
    """

    swap: bool = False
    idle_s: float | None = None
    host_replicas: int = 0


@dataclass
class _Resident:
    replica: Replica
    device: int
    loaded: simpy.Event
    since: float
    users: int = 0
    used_at: float = 0.0
    leaving: bool = False
    watched: bool = False


@dataclass
class Counts:
    """What a fleet did; ``peak`` is the most places in use at once."""

    loads: int = 0
    reads: int = 0
    fetches: int = 0
    peak: int = 0
    waits: int = 0


@dataclass
class Hold:
    """A key's replica while a request uses it."""

    key: Key
    replica: Replica


class Fleet:
    """So many devices with so many places each.

    Args:
        env: of the simulation.
        devices, places: sizes; ``places`` is per device.
    """

    def __init__(
        self, env: simpy.Environment, service: Service, policy: Policy, devices: int, places: int
    ) -> None:
        self._env = env
        self._service = service
        self._policy = policy
        self.computers = [Computer(env) for _ in range(devices)]
        self._links = [simpy.Resource(env, 1) for _ in range(devices)]
        # The device with most free places first; ties by number.
        self._free = [places] * devices
        self._open: list[list[int]] = [[] for _ in range(places + 1)]
        self._open[places] = list(range(devices - 1, -1, -1))
        self._resident: dict[Key, _Resident] = {}
        self._idle: OrderedDict[Key, None] = OrderedDict()
        self._host: OrderedDict[Key, None] = OrderedDict()
        # In order of arrival; all requests of one key wait for one event.
        self._waiting: OrderedDict[Key, simpy.Event] = OrderedDict()
        self.counts = Counts()

    def settle(self, key: Key) -> None:
        """Put a replica in place at once: the state in which a simulation begins."""
        resident = self._put(key, self._take_place())
        resident.loaded.succeed()
        self._idle[key] = None

    def keep_in_host(self, key: Key) -> None:
        """Have a replica in host memory from the beginning, if there is room."""
        if len(self._host) < self._policy.host_replicas:
            self._host[key] = None

    def hold(self, key: Key) -> Generator[simpy.Event, Any, Hold]:
        """Wait until the key's replica computes, and keep it in place until ``release``."""
        resident = self._resident.get(key)
        while resident is None or resident.leaving:
            if resident is None and self._room():
                resident = self._put(key, self._take_place())
                self._env.process(self._load(key, resident))
                break
            self.counts.waits += 1
            yield self._turn(key)
            resident = self._resident.get(key)
            if resident is not None and not resident.leaving and self._room():
                self._wake()  # somebody else has brought it: the place is for the next in line
        resident.users += 1
        self._idle.pop(key, None)
        if not resident.loaded.processed:
            yield resident.loaded
        return Hold(key, resident.replica)

    def release(self, hold: Hold) -> None:
        """A request is over."""
        resident = self._resident[hold.key]
        resident.users -= 1
        resident.used_at = self._env.now
        if not resident.users:
            self._rest(hold.key, resident)

    def _rest(self, key: Key, resident: _Resident) -> None:
        """Nobody uses a replica any more."""
        if resident.leaving:
            self._evict(key)
            return
        self._idle[key] = None
        if self._policy.idle_s is not None and not resident.watched:
            resident.watched = True
            self._env.process(self._leave_when_idle(key, resident))
        self._wake()

    def drop(self, key: Key) -> None:
        """The key is gone: its replica leaves now if idle, otherwise with its last request."""
        self._host.pop(key, None)
        if key in self._idle:
            self._evict(key)
        elif key in self._resident:
            self._resident[key].leaving = True

    @property
    def in_use(self) -> int:
        """Places that are taken now."""
        return len(self._resident)

    def _turn(self, key: Key) -> simpy.Event:
        """An event that comes when a place may have become free, first come first served."""
        if key not in self._waiting:
            self._waiting[key] = self._env.event()
            if self._policy.swap:
                self._env.process(self._insist(self._waiting[key]))
        return self._waiting[key]

    def _insist(self, waiting: simpy.Event) -> Generator[simpy.Event, Any, None]:
        """As the engine does: whoever has held its slot longest gets nothing new until it has left."""
        while not waiting.triggered:
            yield self._env.timeout(TURN_S)
            busy = [r for r in self._resident.values() if r.users and not r.leaving and r.loaded.processed]
            leaving = sum(r.leaving for r in self._resident.values())
            if busy and not waiting.triggered and leaving < len(self._waiting):
                min(busy, key=lambda r: r.since).leaving = True

    def _wake(self) -> None:
        if self._waiting:
            self._waiting.popitem(last=False)[1].succeed()

    def _room(self) -> bool:
        if any(self._open[1:]):
            return True
        return self._policy.swap and bool(self._idle)

    def _take_place(self) -> int:
        """A device with a free place, made free if need be."""
        if not any(self._open[1:]):
            self._evict(next(iter(self._idle)), wake=False)
        level = max(n for n, devices in enumerate(self._open) if devices)
        device = self._open[level].pop()
        self._free[device] = level - 1
        self._open[level - 1].append(device)
        return device

    def _put(self, key: Key, device: int) -> _Resident:
        replica = Replica(self._env, self.computers[device], self._service)
        resident = _Resident(replica, device, self._env.event(), self._env.now)
        self._resident[key] = resident
        self.counts.peak = max(self.counts.peak, len(self._resident))
        return resident

    def _evict(self, key: Key, *, wake: bool = True) -> None:
        self._idle.pop(key, None)
        device = self._resident.pop(key).device
        level = self._free[device]
        self._open[level].remove(device)
        self._free[device] = level + 1
        self._open[level + 1].append(device)
        if wake:
            self._wake()

    def _load(self, key: Key, resident: _Resident) -> Generator[simpy.Event, Any, None]:
        """Start a process where one is needed, then bring the weights: one replica at a time per device."""
        self.counts.loads += 1
        if not self._policy.swap:
            yield self._env.timeout(self._service.start_s)
        with self._links[resident.device].request() as link:
            yield link
            yield self._env.timeout(self._seconds(key))
        resident.since = self._env.now
        resident.loaded.succeed()

    def _seconds(self, key: Key) -> float:
        service = self._service
        if not self._policy.swap:
            self.counts.fetches += 1
            return service.fetch_s + service.read_s + service.swap_s
        if key in self._host:
            self._host.move_to_end(key)
            return service.swap_s
        self._host[key] = None
        while len(self._host) > self._policy.host_replicas:
            self._host.popitem(last=False)
        # Version 0 came to the node's disk when its tenant was accepted; later ones come from the store.
        fresh = key[1] > 0
        self.counts.reads += 1
        self.counts.fetches += fresh
        return service.swap_s + service.read_s + (service.fetch_s if fresh else 0.0)

    def _leave_when_idle(self, key: Key, resident: _Resident) -> Generator[simpy.Event, Any, None]:
        assert self._policy.idle_s is not None
        while True:
            left = resident.used_at + self._policy.idle_s - self._env.now
            if resident.users == 0 and left <= 0:
                break
            yield self._env.timeout(max(left, 0.1) if resident.users == 0 else self._policy.idle_s)
        if self._resident.get(key) is resident:
            self._evict(key)
