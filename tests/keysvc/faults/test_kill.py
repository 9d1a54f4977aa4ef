"""kill -9 at a chosen point of every transition: nothing acknowledged is lost, another goes on."""

from __future__ import annotations

import random
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, get_args

import httpx
import pytest
from tests.keysvc.faults import gate, invariants, steps
from tests.keysvc.faults.calls import until

from anamorph.wire.keyservice import everything
from anamorph.wire.states import TRANSITIONS

if TYPE_CHECKING:
    from tests.keysvc.faults.gate import Point
    from tests.keysvc.faults.lives import Place
    from tests.keysvc.faults.outage import Record
    from tests.keysvc.faults.site import Owner, Site
    from tests.keysvc.faults.steps import Step
    from tests.servers.production import KeyServiceProcess

pytestmark = [pytest.mark.real, pytest.mark.slow]
SEED = 20260711
MOMENTS = random.Random(SEED)  # chosen for repeatability, not for secrecy
# Each transition before its last row is written, and those of two versions and eight others while they
# commit; in any order.
PLACES: list[tuple[Step, Point]] = [(step, "before") for step in steps.STEPS]
PLACES += [(step, "commit") for step in steps.STEPS if step.older]
PLACES += [(step, "commit") for step in MOMENTS.sample([one for one in steps.STEPS if not one.older], 8)]
RUNS = [(*place, MOMENTS.choice(["first", "second"])) for place in MOMENTS.sample(PLACES, len(PLACES))]


def in_vain(step: Step, place: Place, process: KeyServiceProcess) -> None:
    """The same call until the process is dead: on a busy machine it may give up before it is killed."""
    with suppress(httpx.TransportError):
        while step.request(place, process).status >= 400:
            time.sleep(0.1)


def begin(step: Step, place: Place, process: KeyServiceProcess) -> threading.Thread:
    """Make the call that nobody is going to answer."""
    caller = threading.Thread(target=in_vain, args=(step, place, process))
    caller.start()
    return caller


def test_every_transition_is_among_them() -> None:
    """Whatever the state machine admits is done here, and killed in."""
    moved = {move for step in steps.STEPS for move in (step.moves, step.older) if move}
    assert moved >= {(origin, to) for origin, ways in TRANSITIONS.items() for to in ways}


@pytest.mark.parametrize(("step", "point", "victim"), RUNS, ids=lambda part: str(part))
def test_killed_in_a_transition(site: Site, owner: Owner, step: Step, point: Point, victim: str) -> None:
    """The other process is asked the same again: whether or not it was done, it is done once."""
    place = step.arrange(owner)
    (survivor,) = set(site.processes) - {victim}
    with gate.closed(site.production, owner.tenant, step.action, point) as closed:
        caller = begin(step, place, site.processes[victim])
        closed.wait()
        site.kill(victim)
    caller.join()
    again = step.request(place, site.processes[survivor])
    if (step.action, point) == ("release", "commit"):
        # The root may have left: the job asks for a new grant, and the old one is void.
        assert (again.status, again.code) == (409, "grant_used")
    else:
        assert again.status < 300, again.body
    found = invariants.check(site.production)
    wanted = step.states(place)
    assert {version: found[(*owner.at, version)].state for version in wanted} == wanted


@pytest.mark.parametrize("point", get_args(gate.Point))
@pytest.mark.parametrize("step", [steps.PREPARE, steps.SHRED], ids=str)
def test_killed_in_work_of_its_own(
    site: Site, owner: Owner, step: Step, point: Point, record_property: Record
) -> None:
    """Both processes die, one of them with a lease: it runs out, and whoever starts takes the work over."""
    place = step.arrange(owner)
    with gate.closed(site.production, owner.tenant, step.action, point) as closed:
        caller = begin(step, place, site.first)
        closed.wait()
        site.kill("first", "second")
    caller.join()
    site.start("first")
    record_property("resumed_after_s", round(until(lambda: finished(owner, step, place, site.first)), 1))


def finished(owner: Owner, step: Step, place: Place, process: KeyServiceProcess) -> bool:
    with owner.keys(process) as keys:
        if step is steps.PREPARE:
            return keys.get_version(*owner.at, place.version).key_id is not None
        operations = list(everything(keys.list_operations, owner.tenant))
    return all(one.status == "succeeded" for one in operations if one.kind == "shred")
