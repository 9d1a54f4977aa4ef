"""How many devices a placement needs, and how its waiting falls with their number."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.simulation.placements import Name, dedicated_devices
from benchmarks.simulation.run import DAY_S, Result, Scenario, simulate
from benchmarks.simulation.service import Inputs, Service

# What scaling to zero may take of the best that it can do with any number of devices.
TOLERANCE = 1.5
# Sizes that are tried: each so much larger than the one before.
GROWTH = 1.5
_MANY = 100_000

Say = Callable[[str], None]


@dataclass
class Needed:
    """One placement of one model's tenants.

    Args:
        devices: the fewest of the sizes tried that meet the objective.
        objective_s: for the 99th percentile of the time to first token; above the wanted
            one where no number of devices meets that, because the placement's own cold start is longer.
        curve: every size tried.
    """

    name: Name
    model: str
    devices: int
    objective_s: float
    result: Result
    curve: list[Result]

    def row(self) -> dict[str, Any]:
        """The figures of it, without the single requests."""
        shown = {"placement": self.name, "model": self.model, "devices": self.devices}
        curve = [figures(one) for one in sorted(self.curve, key=lambda r: r.devices)]
        return shown | figures(self.result) | {"objective_s": self.objective_s, "curve": curve}


def figures(result: Result) -> dict[str, Any]:
    """A run in numbers."""
    plain = {k: v for k, v in asdict(result).items() if k not in {"ttft_s", "tpot_s"}}
    quantiles = {f"ttft_p{round(100 * q)}_s": result.ttft(q) for q in (0.5, 0.95, 0.99)}
    return plain | quantiles | {"tpot_p99_s": result.tpot(0.99), "unanswered": result.unanswered}


def needed(
    name: Name, inputs: Inputs, service: Service, scenario: Scenario, slo_s: float, say: Say
) -> Needed:
    """The fewest devices that keep the 99th percentile of the time to first token at ``slo_s``."""
    runs: dict[int, Result] = {}
    tenants = scenario.tenants_of(service)

    def run(devices: int) -> Result:
        if devices not in runs:
            runs[devices] = simulate(name, inputs, service, scenario, devices)
            say(f"{name} {service.name}: {devices} devices, p99 TTFT {runs[devices].ttft(0.99):.3g} s")
        return runs[devices]

    if name == "dedicated":
        devices = dedicated_devices(
            inputs, service, round(scenario.tenants * service.share), _spare(scenario, service)
        )
        return Needed(name, service.name, devices, slo_s, run(devices), [run(devices)])
    objective = slo_s
    if name == "zero":
        # With room for every tenant nobody waits for a place, only for a cold start.
        most = dedicated_devices(inputs, service, 2 * tenants, 0)
        objective = max(slo_s, TOLERANCE * run(most).ttft(0.99))
    devices = _smallest(lambda n: run(n).ttft(0.99) <= objective, _least(service, scenario))
    return Needed(name, service.name, devices, objective, runs[devices], list(runs.values()))


def _spare(scenario: Scenario, service: Service) -> int:
    """Places for the rotations that are under way at once, four deviations above their mean."""
    tenants = scenario.tenants_of(service)
    both = tenants * scenario.rotations_per_day / DAY_S * (service.cold_s + scenario.drain_s)
    return math.ceil(both + 4 * math.sqrt(both))


def _least(service: Service, scenario: Scenario) -> int:
    """A size that is surely too small: the device time of the traffic, were every batch full."""
    tokens = scenario.per_s * service.share * 165  # mean of an answer's length
    batch = service.max_concurrent
    return max(1, int(tokens * service.step_s[batch] / batch / 4))


def _smallest(enough: Callable[[int], bool], least: int) -> int:
    """The smallest size that is enough, to within 5 %: growing until one is, then halving the gap."""
    low, high = least - 1, least
    while not enough(high):
        low, high = high, math.ceil(high * GROWTH)
        if high > _MANY:
            raise ValueError("no number of devices is enough: the objective lies below the service time")
    while high - low > max(1, 0.05 * high):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
