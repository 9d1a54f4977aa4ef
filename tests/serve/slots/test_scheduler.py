"""The scheduler against its promises, with any traffic that hypothesis thinks of and a clock of its own."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anamorph.serve.slots.fairness import BURST_S, Bucket, Limits
from anamorph.serve.slots.scheduler import Load, Scheduler

STEP_S = 0.01
QUANTUM_S = 0.1


@dataclass
class World:
    """A pool in virtual time: steps cost ``STEP_S``, swaps take ``swap_steps`` steps of the others."""

    scheduler: Scheduler
    swap_steps: int = 2
    now: float = 0.0
    inside: dict[int, tuple[str, int]] = field(default_factory=dict)  # sequence → member, steps left
    left: dict[int, int] = field(default_factory=dict)
    holds: dict[int, str | None] = field(default_factory=dict)  # what each slot was really filled with
    running: dict[int, set[int]] = field(default_factory=dict)
    loading: dict[Load, int] = field(default_factory=dict)
    steps: Counter[str] = field(default_factory=Counter)
    swaps: int = 0
    finished: dict[int, float] = field(default_factory=dict)
    numbers: int = 0

    def send(self, key_id: str, steps: int, tokens: int = 1) -> int:
        self.numbers += 1
        self.inside[self.numbers] = key_id, tokens
        self.left[self.numbers] = steps
        self.scheduler.enqueue(self.numbers, key_id, tokens)
        return self.numbers

    def turn(self) -> bool:
        """One turn, as the engine takes it; whether anything was computed."""
        for load in self.scheduler.loads(self.now):
            assert not self.running.get(load.slot), "a slot was taken while it computed"
            assert load.slot not in {other.slot for other in self.loading}
            self.holds[load.slot] = None
            self.loading[load] = self.swap_steps
            self.swaps += 1
        for begin in self.scheduler.begins(self.now):
            assert self.holds[begin.slot] == self.inside[begin.number][0], "two keys in one slot"
            self.running.setdefault(begin.slot, set()).add(begin.number)
        slot = self.scheduler.next_step()
        if slot is not None:
            self._step(slot)
        self.now += STEP_S
        for load in list(self.loading):
            self.loading[load] -= 1
            if self.loading[load] <= 0:
                del self.loading[load]
                self.holds[load.slot] = load.key_id
                self.scheduler.loaded(load)
        return slot is not None

    def _step(self, slot: int) -> None:
        assert self.running[slot], "a step without a sequence"
        assert slot not in {load.slot for load in self.loading}, "a step in a slot that is being filled"
        self.steps[str(self.holds[slot])] += 1
        self.scheduler.stepped(slot, STEP_S)
        for number in list(self.running[slot]):
            self.left[number] -= 1
            if self.left[number] == 0:
                self.end(number)

    def end(self, number: int) -> None:
        for numbers in self.running.values():
            numbers.discard(number)
        self.scheduler.leave(number, self.inside[number][1])
        self.finished[number] = self.now

    @property
    def unfinished(self) -> int:
        return self.numbers - len(self.finished)


def world(slots: int, members: dict[str, Limits], places: int = 4) -> World:
    made = World(Scheduler(slots, places, QUANTUM_S))
    for key_id, limits in members.items():
        made.scheduler.put(key_id, limits, 0.0)
    return made


MEMBERS = [f"m{i}" for i in range(8)]
arrivals = st.lists(
    st.tuples(st.sampled_from(MEMBERS), st.integers(1, 30), st.integers(0, 40), st.booleans()), max_size=60
)


@settings(deadline=None, max_examples=200)
@given(slots=st.integers(1, 4), arriving=arrivals, limit=st.integers(1, 5))
def test_nobody_starves_and_no_slot_holds_two_keys(
    slots: int, arriving: list[tuple[str, int, int, bool]], limit: int
) -> None:
    """Whatever arrives and whoever hangs up: all that stays is finished, soon after it could have been."""
    pool = world(slots, dict.fromkeys(MEMBERS, Limits(max_concurrent=limit)))
    work = 0
    for key_id, steps, pause, hangs_up in arriving:
        number = pool.send(key_id, steps)
        work += steps
        for _ in range(pause):
            pool.turn()
        if hangs_up and number not in pool.finished:
            pool.end(number)
    # Every turn computes, or waits for a swap; a swap is for a sequence at least.
    for _ in range(work + (pool.swap_steps + 1) * (pool.numbers + 1) * 8):
        pool.turn()
    assert pool.unfinished == 0


@settings(deadline=None, max_examples=200)
@given(slots=st.integers(1, 4), arriving=arrivals)
def test_the_engine_is_never_idle_while_something_can_be_computed(
    slots: int, arriving: list[tuple[str, int, int, bool]]
) -> None:
    """A turn without a step is one in which every sequence waits for a swap that has begun."""
    pool = world(slots, dict.fromkeys(MEMBERS, Limits()))
    for key_id, steps, pause, _ in arriving:
        pool.send(key_id, steps)
        for _ in range(pause + 1):
            before = pool.unfinished
            loading = bool(pool.loading)
            computed = pool.turn()
            assert computed or not before or loading or pool.loading


@pytest.mark.parametrize("slots", [3, 2, 1])
def test_weights_are_honoured(slots: int) -> None:
    """Three members that always want more get the engine's time by weight, with a slot each or without."""
    weights = {"m0": 1.0, "m1": 2.0, "m2": 4.0}
    pool = world(slots, {key: Limits(weight=w) for key, w in weights.items()})
    for _ in range(20_000):
        for key_id, count in pool.scheduler.waiting().items() | dict.fromkeys(weights, 0).items():
            if count == 0:
                pool.send(key_id, 5)
        pool.turn()
    total = sum(pool.steps.values())
    shares = {key: pool.steps[key] / total for key in weights}
    assert shares == pytest.approx({key: w / 7 for key, w in weights.items()}, rel=0.1)


@settings(deadline=None, max_examples=50)
@given(weights=st.lists(st.floats(0.25, 8), min_size=2, max_size=4), cost=st.integers(1, 20))
def test_service_differs_by_one_step_at_most(weights: list[float], cost: int) -> None:
    """Start-time fair queueing's bound: between backlogged members, l/w of one step each."""
    members = {f"m{i}": Limits(weight=w) for i, w in enumerate(weights)}
    pool = world(len(weights), members)
    for key_id in members:
        pool.send(key_id, 10**6)
    costs = {key: STEP_S * (1 + (cost * i) % 7) for i, key in enumerate(members)}
    served = dict.fromkeys(members, 0.0)
    for _ in range(10):
        pool.turn()
    for _ in range(300):
        slot = pool.scheduler.next_step()
        assert slot is not None
        key = str(pool.holds[slot])
        pool.scheduler.stepped(slot, costs[key])
        served[key] += costs[key] / members[key].weight
    bound = sum(sorted(costs[key] / members[key].weight for key in members)[-2:])
    start = 10 * STEP_S / min(weights)
    assert max(served.values()) - min(served.values()) <= bound + start + 1e-9


def test_an_idle_member_saves_nothing_up_and_owes_nothing() -> None:
    """Who comes back gets his share from now on: neither more for having been away, nor does the other."""
    pool = world(2, {"m0": Limits(), "m1": Limits()})
    pool.send("m0", 1000)
    for _ in range(500):
        pool.turn()
    pool.send("m1", 1000)
    before = pool.steps.copy()
    for _ in range(203):
        pool.turn()
    assert abs((pool.steps - before)["m0"] - (pool.steps - before)["m1"]) <= 4


def test_an_idle_slot_is_taken_first_and_then_the_one_with_most_service() -> None:
    """The one that computes is let finish, and begins nothing new until somebody else had his turn."""
    pool = world(2, {key: Limits(max_concurrent=1) for key in MEMBERS})
    pool.send("m0", 3)
    first = [pool.send("m1", 50) for _ in range(4)]
    while pool.unfinished > 4:
        pool.turn()
    pool.send("m2", 5000)
    while pool.scheduler.in_slots() != ["m2", "m1"]:
        pool.turn()
    third = pool.send("m3", 1)
    while third not in pool.finished:
        pool.turn()
    assert first[0] in pool.finished
    assert first[3] not in pool.finished
    assert pool.scheduler.in_slots() == ["m2", "m3"]
    assert pool.swaps == 4


def test_swaps_are_bounded_by_the_quantum() -> None:
    """Eight members that always want more on two slots: between two swaps lies a quantum of computing."""
    pool = world(2, {key: Limits() for key in MEMBERS})
    for _ in range(5000):
        for key_id in set(MEMBERS) - set(pool.scheduler.waiting()):
            pool.send(key_id, 1)
        pool.turn()
    assert pool.swaps <= sum(pool.steps.values()) * STEP_S / QUANTUM_S * 2
    assert max(pool.steps.values()) <= 1.5 * min(pool.steps.values())


def test_limits_hold() -> None:
    """No more sequences of a member at a time than it may have, in a slot that has places left."""
    pool = world(1, {"m0": Limits(max_concurrent=2)}, places=4)
    for _ in range(5):
        pool.send("m0", 10)
    for _ in range(4):
        pool.turn()
    assert len(pool.running[0]) == 2


def test_a_rate_limit_holds_over_time() -> None:
    """Ids per second, over any time, up to the burst and one request."""
    pool = world(1, {"m0": Limits(tokens_per_s=50)})
    for _ in range(200):
        pool.send("m0", 1, tokens=20)
    for _ in range(1000):
        pool.turn()
    ids = 20 * len(pool.finished)
    assert 50 * pool.now * 0.9 <= ids <= 50 * (pool.now + BURST_S) + 20


def test_a_rate_limited_member_gives_its_slot_to_others() -> None:
    """Who may not begin is idle, whatever stands in his queue; when he may begin is known."""
    pool = world(1, {"m0": Limits(tokens_per_s=1), "m1": Limits()})
    for _ in range(3):
        pool.send("m0", 1, tokens=5)
    for _ in range(20):
        pool.turn()
    other = pool.send("m1", 1)
    for _ in range(20):
        pool.turn()
    assert other in pool.finished
    assert pool.scheduler.next_change(pool.now) == pytest.approx(pool.scheduler.wait("m0", pool.now))
    assert pool.scheduler.wait("m0", pool.now) > 0


def test_a_bucket_gives_back_what_was_not_used() -> None:
    """A bound is taken, its unused part returned; a debt stays one under another rate."""
    bucket = Bucket(10, now=0)
    bucket.take(100)
    bucket.give_back(95)
    assert bucket.wait(0) == 0
    bucket.take(25)
    assert bucket.wait(0) == pytest.approx(2.1)
    bucket.change(1, now=0)
    assert bucket.wait(0) == pytest.approx(21)
    bucket.change(None, now=0)
    assert bucket.wait(0) == 0


def test_a_removed_member_leaves_a_free_slot() -> None:
    """Also in the middle of a swap: the slot is free when that is through, and not before."""
    pool = world(1, {"m0": Limits(), "m1": Limits()})
    number = pool.send("m0", 5)
    pool.turn()
    pool.end(number)
    pool.scheduler.remove("m0")
    second = pool.send("m1", 1)
    for _ in range(10):
        pool.turn()
    assert second in pool.finished


def test_a_failed_load_leaves_a_free_slot() -> None:
    """And the member may be loaded again."""
    scheduler = Scheduler(1, 4)
    scheduler.put("m0", Limits(), 0)
    scheduler.enqueue(1, "m0", 1)
    (load,) = scheduler.loads(0)
    scheduler.loaded(load, good=False)
    assert scheduler.in_slots() == [None]
    assert scheduler.loads(0) == [load]
