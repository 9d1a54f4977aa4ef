"""The simulator against queueing theory, where theory knows the answer exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import pytest
import simpy
from benchmarks.simulation.device import PIECE, Computer, Replica
from benchmarks.simulation.fleet import Fleet, Policy
from benchmarks.simulation.placements import spread
from benchmarks.simulation.run import Scenario, simulate
from benchmarks.simulation.service import Device, Inputs, Service
from benchmarks.simulation.traffic import draw, zipf

ARRIVALS = 60_000
Draw = Callable[[np.random.Generator], float]


def service(**changes: Any) -> Service:
    """A model whose decoding step takes one second, whatever the batch."""
    times: dict[str, Any] = {
        "name": "m",
        "share": 1.0,
        "weight_bytes": 10.0,
        "cache_bytes": 5.0,
        "prefill_s": 0.0,
        "steps": ((1, 1.0), (256, 1.0)),
        "swap_s": 1.0,
        "read_s": 4.0,
        "fetch_s": 16.0,
        "start_s": 64.0,
    }
    return Service(**(times | changes))


def waits(model: Service, per_s: float, work: Draw, *, prompts: bool = False) -> tuple[float, float]:
    """Mean seconds in the system, and mean seconds of the work itself, of Poisson arrivals at one replica."""
    env, source = simpy.Environment(), np.random.default_rng(7)
    replica = Replica(env, Computer(env), model)
    inside: list[float] = []
    asked: list[float] = []

    def request(amount: float) -> Generator[simpy.Event, Any, None]:
        began = env.now
        yield from replica.answer(amount, 0) if prompts else replica.answer(0, amount)
        inside.append(env.now - began)

    def arrivals() -> Generator[simpy.Event, Any, None]:
        for _ in range(ARRIVALS):
            yield env.timeout(source.exponential(1 / per_s))
            asked.append(work(source))
            env.process(request(asked[-1]))

    env.process(arrivals())
    env.run()
    assert len(inside) == ARRIVALS
    return float(np.mean(inside)), float(np.mean(asked))


def exponential(source: np.random.Generator) -> float:
    return float(source.exponential())


def one(_: np.random.Generator) -> float:
    return 1.0


def erlang_c(servers: int, load: float) -> float:
    """Probability that a customer of M/M/c waits; ``load`` in erlangs."""
    terms = [load**k / math.factorial(k) for k in range(servers)]
    last = load**servers / math.factorial(servers) * servers / (servers - load)
    return last / (sum(terms) + last)


def mdc_wait(servers: int, load: float) -> float:
    """Mean wait in M/D/c with a service of one second: Crommelin's chain, solved numerically."""
    size = 400
    poisson = np.array([math.exp(-load + k * math.log(load) - math.lgamma(k + 1)) for k in range(size)])
    state = np.full(size, 1 / size)
    for _ in range(3000):
        left = np.concatenate([[state[: servers + 1].sum()], state[servers + 1 :]])
        state = np.convolve(left, poisson)[:size]
        state /= state.sum()
    waiting = float(np.maximum(np.arange(size) - servers, 0) @ state)
    return waiting / load  # Little


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_sequence_at_a_time_is_m_m_1(load: float) -> None:
    """Mean wait ρ/(1-ρ) with exponential service of mean one second."""
    inside, work = waits(service(max_concurrent=1), load, exponential)
    assert inside - work == pytest.approx(load / (1 - load), rel=0.08)


def test_prompts_queue_as_m_d_1() -> None:
    """Prompts of equal length, one at a time: Pollaczek and Khinchine's ρ/2(1-ρ)."""
    model = service(prefill_s=1 / PIECE, max_concurrent=200)
    inside, _ = waits(model, 0.7, lambda _: float(PIECE), prompts=True)
    assert inside - 1 == pytest.approx(0.7 / (2 * 0.3), rel=0.08)


@pytest.mark.parametrize("servers", [2, 4])
def test_places_are_m_m_c(servers: int) -> None:
    """A step that takes as long for any batch makes places independent servers: Erlang's C."""
    load = 0.8 * servers
    inside, work = waits(service(max_concurrent=servers), load, exponential)
    assert inside - work == pytest.approx(erlang_c(servers, load) / (servers - load), rel=0.1)


@pytest.mark.parametrize("servers", [1, 3])
def test_places_are_m_d_c(servers: int) -> None:
    """Answers of equal length: M/D/c."""
    load = 0.8 * servers
    inside, _ = waits(service(max_concurrent=servers), load, one)
    assert inside - 1 == pytest.approx(mdc_wait(servers, load), rel=0.1)


@pytest.mark.parametrize("work", [exponential, one])
def test_a_step_in_proportion_to_its_batch_is_processor_sharing(work: Draw) -> None:
    """M/G/1 with sharing: 1/(1-ρ) seconds in the system, whatever the distribution."""
    model = service(steps=((1, 1.0), (256, 256.0)), max_concurrent=256)
    inside, _ = waits(model, 0.7, work)
    assert inside == pytest.approx(1 / 0.3, rel=0.08)


def test_two_busy_replicas_take_turns() -> None:
    """Each takes twice its own time, and the device is busy for the sum."""
    env = simpy.Environment()
    device = Computer(env)
    ends: list[float] = []

    def work(replica: Replica) -> Generator[simpy.Event, Any, None]:
        yield from replica.answer(0, 10)
        ends.append(env.now)

    for _ in range(2):
        env.process(work(Replica(env, device, service())))
    env.run()
    assert ends == pytest.approx([20, 20])
    assert device.busy_s == pytest.approx(20)


def use(env: simpy.Environment, fleet: Fleet, plan: list[tuple[float, int, float]]) -> dict[int, float]:
    """Hold replicas: (when, tenant, for how long). When each tenant's last came into use."""
    came: dict[int, float] = {}

    def one_use(at: float, tenant: int, seconds: float) -> Generator[simpy.Event, Any, None]:
        yield env.timeout(at)
        hold = yield from fleet.hold((tenant, 0))
        came[tenant] = env.now
        yield env.timeout(seconds)
        fleet.release(hold)

    for step in plan:
        env.process(one_use(*step))
    env.run(1000)
    return came


def test_the_least_recently_used_slot_is_given_away() -> None:
    """With two slots, a third tenant takes the place of the one that was used longest ago."""
    env = simpy.Environment()
    fleet = Fleet(env, service(), Policy(swap=True, host_replicas=8), 1, 2)
    for tenant in range(3):
        fleet.keep_in_host((tenant, 0))
    came = use(env, fleet, [(0, 0, 1), (5, 1, 1), (10, 0, 1), (20, 2, 1), (30, 0, 1), (40, 1, 1)])
    assert came == {0: 30, 2: 21, 1: 41}
    assert fleet.counts.loads == 4


def test_a_replica_that_is_never_idle_gives_way() -> None:
    """One tenant keeps the only slot busy with overlapping requests; another still comes in."""
    env = simpy.Environment()
    fleet = Fleet(env, service(), Policy(swap=True, host_replicas=8), 1, 1)
    plan = [(at, 0, 3.0) for at in range(100)] + [(20.0, 1, 1.0)]
    assert use(env, fleet, plan)[1] < 40


def test_what_is_not_in_host_memory_is_read_first() -> None:
    """Swap from host memory takes one second, through the disk four more."""
    env = simpy.Environment()
    fleet = Fleet(env, service(), Policy(swap=True, host_replicas=1), 1, 1)
    fleet.keep_in_host((0, 0))
    assert use(env, fleet, [(0, 0, 1), (10, 1, 1), (20, 0, 1)]) == {1: 15, 0: 25}


def test_an_idle_replica_leaves_and_comes_back_cold() -> None:
    """Scaled to zero: gone after its idle time, then the whole cold start; not gone before."""
    env = simpy.Environment()
    fleet = Fleet(env, service(), Policy(idle_s=50), 1, 1)
    assert use(env, fleet, [(0, 0, 1), (120, 0, 1)])[0] == 120
    assert fleet.in_use == 0
    env = simpy.Environment()
    fleet = Fleet(env, service(), Policy(idle_s=50), 1, 1)
    assert use(env, fleet, [(0, 0, 1), (300, 0, 1)])[0] == 300 + service().cold_s


def inputs(model: Service) -> Inputs:
    device = Device(name="d", memory_bytes=40, host_bytes=100, process_bytes=1)
    return Inputs(device=device, services=(model,), source={})


FAST = {"prefill_s": 1e-5, "steps": ((1, 0.005), (16, 0.006)), "swap_s": 0.2, "read_s": 1.0, "fetch_s": 5.0}
SMALL = Scenario(tenants=60, per_s=3, seconds=300, warm_up_s=100, rotations_per_day=100, drain_s=30)


@pytest.mark.parametrize(
    ("name", "devices"), [("plaintext", 1), ("dedicated", 40), ("zero", 40), ("shared", 4)]
)
def test_every_request_is_answered_and_keys_rotate(name: Any, devices: int) -> None:
    """No placement loses a request, and a run repeats itself for the same seed."""
    model = service(**FAST)
    first, again = (simulate(name, inputs(model), model, SMALL, devices) for _ in range(2))
    assert first.arrived > 500
    assert first.unanswered == 0
    assert (first.rotated > 10) is (name != "plaintext")
    assert first == again


def test_fewer_devices_wait_longer() -> None:
    """The comparison's curve falls: half the engines, longer times to first token."""
    model = service(**FAST)
    few, many = (simulate("shared", inputs(model), model, SMALL, devices).ttft(0.99) for devices in (2, 8))
    assert few > many


def test_traffic_is_as_asked() -> None:
    """Rate, tenants by Zipf's law, times in order."""
    traffic = draw(3, tenants=1000, per_s=50, seconds=2000)
    assert len(traffic.at) == pytest.approx(100_000, rel=0.03)
    assert (np.diff(traffic.at) >= 0).all()
    assert np.mean(traffic.tenant == 0) == pytest.approx(zipf(1000, 1.0)[0], rel=0.1)


def test_tenants_are_spread_by_their_traffic() -> None:
    """No device has more than the mean and one tenant."""
    shares = zipf(500, 0.8)
    home = np.array(spread(shares.tolist(), 10))
    loads = [shares[home == number].sum() for number in range(10)]
    assert max(loads) <= 0.1 + shares[0]
    assert min(loads) > 0.05
