"""Room before work: what is begun, what waits, what is given up, and what Ray is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest

from anamorph.serve.cluster.placement import Node, Room
from anamorph.serve.cluster.sizing import Size
from anamorph.wire.admin import Autoscaling, KeyVersionRead, ModelRead, Serving
from anamorph.wire.serving import EngineSettings, PoolSettings
from anamorph.wire.states import State
from anamorph_operator.actions import Action, FailVersion, Hold, StartJob
from anamorph_operator.applications import applications
from anamorph_operator.begin import Limits
from anamorph_operator.plan import plan
from anamorph_operator.state import AppStatus, Deployed, Desired, Job, Observed, Ref

Build = Callable[..., KeyVersionRead]
Want = Callable[..., Desired]
# 512 MiB for the process, 3,584 for weights: 4 GiB in all, no cache.
SIZE = Size(weights=3584 * 2**20, token=0)
ASLEEP = Serving(autoscaling=Autoscaling(min_replicas=0))
TENANTS = ("acme", "globex", "initech")


def node(memory: int | None, cpus: float = 8) -> tuple[Node, ...]:
    return (Node("a", Room(cpus, 0, memory)),)


@pytest.fixture
def tenants(desired: Want, model: ModelRead) -> Want:
    """Three tenants with a model each on the torch engine; ``serving`` is of all of them."""

    def build(*versions: KeyVersionRead, serving: Serving = Serving(), **fields: Any) -> Desired:
        update = {"engine": "torch", "serving": serving}
        models = tuple(model.model_copy(update={**update, "tenant": name}) for name in TENANTS)
        return desired(*versions, models=models, **fields)

    return build


def of(tenant: str, version: KeyVersionRead) -> KeyVersionRead:
    return version.model_copy(update={"tenant": tenant})


def seen(desired: Desired, now: datetime, cluster: tuple[Node, ...], **fields: Any) -> Observed:
    """Everything stands that is wanted, on a cluster."""
    empty = Observed(deployed={}, cluster=cluster, sizes={("/bases/smol", "auto"): SIZE})
    apps = applications(desired, empty, now)
    deployed = {a.name: Deployed(a.name, AppStatus.RUNNING, a, now) for a in apps}
    return replace(empty, deployed=deployed, **fields)


def about(actions: list[Action], tenant: str) -> list[Action]:
    kinds = (StartJob, Hold, FailVersion)
    return [a for a in actions if isinstance(a, kinds) and a.ref.tenant == tenant]


def test_a_version_that_does_not_fit_now_waits_and_says_why(
    tenants: Want, version: Build, now: datetime
) -> None:
    """10 GiB hold two of 4: the third tenant waits, with the numbers, and begins when there is room."""
    want = tenants(
        of("acme", version(1, State.ACTIVE)),
        of("globex", version(1, State.ACTIVE)),
        of("initech", version(1, State.PENDING)),
    )
    [hold] = about(plan(want, seen(want, now, node(10_240)), now), "initech")
    assert isinstance(hold, Hold)
    assert "needs 4,096 MiB" in hold.reason
    assert "a has 2,048 MiB" in hold.reason
    [start] = about(plan(want, seen(want, now, node(12_288)), now), "initech")
    assert isinstance(start, StartJob)


def test_a_rotation_needs_room_beside_what_it_replaces(tenants: Want, version: Build, now: datetime) -> None:
    """One version fits, two do not: the rotation waits, and what serves goes on."""
    want = tenants(version(1, State.ACTIVE), version(2, State.PENDING))
    [hold] = plan(want, seen(want, now, node(8_000)), now)
    assert isinstance(hold, Hold)
    [start] = plan(want, seen(want, now, node(8_192)), now)
    assert isinstance(start, StartJob)


def test_what_would_never_fit_is_given_up(tenants: Want, version: Build, now: datetime) -> None:
    """Not even alone: waiting for room would be waiting for good."""
    want = tenants(version(1, State.PENDING))
    [failure] = plan(want, seen(want, now, node(4_000)), now)
    assert isinstance(failure, FailVersion)
    assert "empty cluster" in failure.reason


@pytest.mark.parametrize("cluster", [(), node(4_000)])
def test_where_nodes_come_and_go_it_waits_for_others(
    tenants: Want, version: Build, now: datetime, cluster: tuple[Node, ...]
) -> None:
    """A cluster that has lost its workers for a moment must not cost a version."""
    want = tenants(version(1, State.PENDING))
    [hold] = plan(want, seen(want, now, cluster), now, Limits(nodes_change=True))
    assert isinstance(hold, Hold)
    assert "empty cluster" in hold.reason


@pytest.mark.parametrize("cluster", [None, node(None)])
def test_a_machine_that_announces_nothing_stops_nobody(
    tenants: Want, version: Build, now: datetime, cluster: tuple[Node, ...]
) -> None:
    """And nothing is asked of Ray that no node has, which would wait for good."""
    want = tenants(version(1, State.ACTIVE), version(2, State.PENDING))
    observed = seen(want, now, cluster)
    assert isinstance(plan(want, observed, now)[0], StartJob)
    settings = observed.deployed["acme.smol.v1"].application.settings  # type: ignore[index, union-attr]
    assert isinstance(settings, EngineSettings)
    assert settings.memory_mib == 0


def test_rays_own_resources_bind_too(tenants: Want, version: Build, now: datetime) -> None:
    """Without a free CPU an application would wait in Ray, and nobody would know why."""
    want = tenants(version(1, State.ACTIVE), version(2, State.PENDING))
    [hold] = plan(want, seen(want, now, node(None, cpus=1)), now)
    assert isinstance(hold, Hold)
    assert "1 CPUs" in hold.reason


def test_versions_on_their_way_count(tenants: Want, version: Build, now: datetime) -> None:
    """Room for one: of two that could begin the older begins; while it is made the other waits."""
    want = tenants(version(1, State.PENDING), of("globex", version(1, State.PENDING)))
    both = Limits(parallel_jobs=2)
    kinds = [type(a) for a in plan(want, seen(want, now, node(6_000)), now, both)]
    assert kinds == [StartJob, Hold]
    running = {Ref("acme", "smol", 1): Job(True, 1)}
    [hold] = plan(want, seen(want, now, node(6_000), jobs=running), now, both)
    assert isinstance(hold, Hold)
    assert hold.ref.tenant == "globex"


def test_who_waits_for_room_holds_nobody_else_up(tenants: Want, version: Build, now: datetime) -> None:
    """A smaller one behind a larger one begins."""
    waiting = version(1, State.PENDING)
    want = tenants(waiting, of("globex", waiting), of("initech", version(1, State.ACTIVE)))
    other = tuple(
        m.model_copy(update={"base": "/bases/tiny"}) if m.tenant == "globex" else m for m in want.models
    )
    sizes = {("/bases/smol", "auto"): Size(5_000 * 2**20, 0), ("/bases/tiny", "auto"): Size(100 * 2**20, 0)}
    want = replace(want, models=other)
    actions = plan(want, replace(seen(want, now, node(6_000)), sizes=sizes), now)
    assert [type(action) for action in about(actions, "acme")] == [Hold]
    assert [type(action) for action in about(actions, "globex")] == [StartJob]


def test_sleepers_share_the_room_for_one_of_them(tenants: Want, version: Build, now: datetime) -> None:
    """Any number of versions that may sleep fits where one does; an always-on one must leave that room."""
    sleeping = [of(name, version(1, State.ACTIVE)) for name in ("acme", "globex")]
    third = of("initech", version(1, State.PENDING))
    want = tenants(*sleeping, third, serving=ASLEEP)
    [start] = about(plan(want, seen(want, now, node(4_096)), now), "initech")
    assert isinstance(start, StartJob)
    always = tuple(
        m.model_copy(update={"serving": Serving()}) if m.tenant == "initech" else m for m in want.models
    )
    mixed = replace(want, models=always)
    [hold] = about(plan(mixed, seen(mixed, now, node(8_000)), now), "initech")
    assert isinstance(hold, Hold)
    [start] = about(plan(mixed, seen(mixed, now, node(8_192)), now), "initech")
    assert isinstance(start, StartJob)


def test_ray_is_asked_for_what_was_planned(tenants: Want, version: Build, now: datetime) -> None:
    """Per rank; for a pool all slots and their caches."""
    ranks = tenants(version(1, State.ACTIVE), serving=Serving(tensor_parallel=2))
    apps = seen(ranks, now, node(50_000)).deployed or {}
    found = apps["acme.smol.v1"].application.settings  # type: ignore[union-attr]
    assert isinstance(found, EngineSettings)
    assert found.memory_mib == 512 + 3584 // 2
    shared = Serving(placement="shared", pool="small")
    pools = {"small": {"slots": 3}}
    pooled = seen(tenants(version(1, State.ACTIVE), serving=shared, pools=pools), now, node(50_000))
    settings = (pooled.deployed or {})["shared.small"].application.settings  # type: ignore[union-attr]
    assert isinstance(settings, PoolSettings)
    assert settings.memory_mib == 512 + 3 * 3584


def test_a_member_of_a_pool_that_stands_needs_no_more_room(
    tenants: Want, version: Build, now: datetime
) -> None:
    """That is what pools are for: the slots are reserved, whoever is in them."""
    shared = Serving(placement="shared", pool="small")
    pools = {"small": {"slots": 1}}
    want = tenants(
        version(1, State.ACTIVE), of("globex", version(1, State.PENDING)), serving=shared, pools=pools
    )
    [start] = plan(want, seen(want, now, node(4_096)), now)
    assert isinstance(start, StartJob)
    [failure] = plan(want, replace(seen(want, now, node(4_000)), deployed={}), now)[1:]
    assert isinstance(failure, FailVersion)
