"""One run: traffic on a placement, with rotations, measured after a warm-up."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy
from benchmarks.simulation.placements import Ground, Name, Site, build
from benchmarks.simulation.service import Inputs, Service
from benchmarks.simulation.traffic import Traffic, draw, zipf

DAY_S = 86_400.0
# What the operator computes with a new version before it is activated.
PROBE = (32.0, 16.0)
# After the last arrival, so that only what hangs is left without an answer.
RUN_OUT_S = 180.0
# So many requests inside mean that a placement is overloaded: no more are needed to see it.
HOPELESS = 5000


@dataclass(frozen=True)
class Scenario:
    """What all placements of a comparison have in common.

    Args:
        per_s: requests a second of all tenants together.
        seconds: measured, after ``warm_up_s``.
        rotations_per_day: of each tenant's key.
        drain_s: both versions are kept for so long.
    """

    seed: int = 1
    tenants: int = 10_000
    per_s: float = 60.0
    exponent: float = 1.0
    seconds: float = 1200.0
    warm_up_s: float = 600.0
    rotations_per_day: float = 1.0
    drain_s: float = 600.0

    @property
    def end_s(self) -> float:
        return self.warm_up_s + self.seconds

    def tenants_of(self, service: Service) -> int:
        """How many tenants use a model."""
        return round(self.tenants * service.share)

    def traffic(self, service: Service) -> tuple[Traffic, list[float]]:
        """Requests for one model's tenants, and each tenant's part of them."""
        tenants = self.tenants_of(service)
        traffic = draw(
            self.seed,
            tenants=tenants,
            per_s=self.per_s * service.share,
            seconds=self.end_s,
            exponent=self.exponent,
        )
        return traffic, zipf(tenants, self.exponent).tolist()


@dataclass
class Result:
    """What one run showed.

    Args:
        ttft_s, tpot_s: of each request that arrived after the warm-up and was answered.
        unanswered: of those, still waiting when the run ended.
        busy: part of the measured time in which a device computed, averaged over the devices.
        peak_places, mean_places: replicas in place.
        overloaded: it was given up, with thousands of requests inside.
    """

    devices: int
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    arrived: int = 0
    rotated: int = 0
    loads: int = 0
    peak_places: int = 0
    mean_places: float = 0.0
    busy: float = 0.0
    overloaded: bool = False

    @property
    def unanswered(self) -> int:
        return self.arrived - len(self.ttft_s)

    def ttft(self, share: float) -> float:
        """Quantile of the time to first token; who got none counts as having waited for ever."""
        if self.overloaded:
            return float("inf")
        waited = np.sort(self.ttft_s)
        rank = int(np.ceil(share * self.arrived)) - 1
        return float(waited[rank]) if 0 <= rank < len(waited) else float("inf")

    def tpot(self, share: float) -> float:
        """Quantile of the time per output token."""
        return float(np.quantile(self.tpot_s, share)) if self.tpot_s else float("nan")


def simulate(name: Name, inputs: Inputs, service: Service, scenario: Scenario, devices: int) -> Result:
    """Run one placement of one model's tenants."""
    env = simpy.Environment()
    traffic, shares = scenario.traffic(service)
    site = build(name, Ground(env, inputs, service, shares, devices))
    run = _Run(env, site, scenario, Result(devices), [0] * len(shares))
    env.process(run.arrivals(traffic))
    if name != "plaintext":
        env.process(run.rotations(len(shares)))
    env.process(run.watch())
    env.run(scenario.end_s)
    run.close()
    env.run(scenario.end_s + RUN_OUT_S)
    return run.result


class _Run:
    def __init__(
        self, env: simpy.Environment, site: Site, scenario: Scenario, result: Result, versions: list[int]
    ) -> None:
        self._env = env
        self._site = site
        self._scenario = scenario
        self.result = result
        self._versions = versions
        self._inside = 0
        self._busy_before = 0.0
        self._loads_before = 0

    def arrivals(self, traffic: Traffic) -> Generator[simpy.Event, Any, None]:
        """Start each request at its time, whatever became of those before it."""
        for at, tenant, prompt, output in traffic.requests():
            if at > self._env.now:
                yield self._env.timeout(at - self._env.now)
            if self._inside > HOPELESS:
                self.result.overloaded = True
                return
            self._env.process(self._request(tenant, prompt, output))

    def _request(self, tenant: int, prompt: float, output: float) -> Generator[simpy.Event, Any, None]:
        began, counted = self._env.now, self._env.now >= self._scenario.warm_up_s
        self.result.arrived += counted
        self._inside += 1
        fleet, first = self._site.of(tenant), self._env.event()
        hold = yield from fleet.hold(self._site.key(tenant, self._versions[tenant]))
        answering = self._env.process(hold.replica.answer(prompt, output - 1, first))
        yield first
        spoke = self._env.now
        if counted:
            self.result.ttft_s.append(spoke - began)
        yield answering
        fleet.release(hold)
        self._inside -= 1
        if counted and output > 1:
            self.result.tpot_s.append((self._env.now - spoke) / (output - 1))

    def rotations(self, tenants: int) -> Generator[simpy.Event, Any, None]:
        """Rotations at random moments, each tenant's key as often as the scenario says."""
        per_s = tenants * self._scenario.rotations_per_day / DAY_S
        source = np.random.default_rng(self._scenario.seed + 1)
        while per_s > 0:
            yield self._env.timeout(source.exponential(1 / per_s))
            self._env.process(self._rotate(int(source.integers(tenants))))

    def _rotate(self, tenant: int) -> Generator[simpy.Event, Any, None]:
        """The new version beside the old one, probed, then used; the old one leaves after its drain."""
        fleet, old = self._site.of(tenant), self._versions[tenant]
        key = self._site.key(tenant, old + 1)
        hold = yield from fleet.hold(key)
        yield self._env.process(hold.replica.answer(*PROBE))
        fleet.release(hold)
        if self._versions[tenant] != old:
            return
        self._versions[tenant] = old + 1
        self.result.rotated += 1
        yield self._env.timeout(self._scenario.drain_s)
        fleet.drop(self._site.key(tenant, old))

    def watch(self) -> Generator[simpy.Event, Any, None]:
        """Note how many places are taken, every ten seconds of the measured time."""
        yield self._env.timeout(self._scenario.warm_up_s)
        self._busy_before, self._loads_before = self._busy(), self._loads()
        samples = []
        while self._env.now < self._scenario.end_s:
            samples.append(self._site.in_use)
            self.result.mean_places = sum(samples) / len(samples)
            self.result.peak_places = max(samples)
            yield self._env.timeout(10.0)

    def close(self) -> None:
        """The measured time is over."""
        devices = sum(len(fleet.computers) for fleet in self._site.fleets)
        self.result.busy = (self._busy() - self._busy_before) / devices / self._scenario.seconds
        self.result.loads = self._loads() - self._loads_before

    def _busy(self) -> float:
        return sum(computer.busy_s for fleet in self._site.fleets for computer in fleet.computers)

    def _loads(self) -> int:
        return sum(fleet.counts.loads for fleet in self._site.fleets)
