"""Pools and sleeping versions as the operator writes them: members, routes, and what the door is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest

from anamorph.errors import SetupError
from anamorph.wire.admin import Autoscaling, KeyVersionRead, ModelRead, Serving
from anamorph.wire.serving import (
    Cache,
    DoorState,
    EngineSettings,
    PoolMember,
    PoolSettings,
    PoolState,
    Route,
    Usage,
)
from anamorph.wire.states import State
from anamorph_operator.actions import Apply, FailVersion, Verify
from anamorph_operator.applications import HELD, REDEPLOY_AFTER, applications
from anamorph_operator.main import parse_pool
from anamorph_operator.plan import plan
from anamorph_operator.state import Application, AppStatus, Deployed, Desired, Observed, Ref

Build = Callable[..., KeyVersionRead]
Want = Callable[..., Desired]
SHARED = Serving(placement="shared", pool="small", weight=2.0, max_concurrent=4)
EMPTY = Observed(deployed={})


@pytest.fixture
def sharing(desired: Want, model: ModelRead) -> Want:
    """Two tenants' models in one pool."""
    fields = {"serving": SHARED, "last_version": 1}
    models = [model.model_copy(update={**fields, "tenant": name}) for name in ("acme", "globex")]

    def build(*versions: KeyVersionRead, **fields: Any) -> Desired:
        return desired(*versions, **({"models": tuple(models)} | fields))

    return build


def foreign(version: KeyVersionRead) -> KeyVersionRead:
    return version.model_copy(update={"tenant": "globex"})


def standing(
    apps: tuple[Application, ...], now: datetime, status: AppStatus = AppStatus.RUNNING, **fields: Any
) -> Observed:
    return Observed(deployed={a.name: Deployed(a.name, status, a, now) for a in apps}, **fields)


def pool_of(apps: tuple[Application, ...]) -> tuple[PoolSettings, tuple[PoolMember, ...]]:
    [pool] = [app for app in apps if app.name == "shared.small"]
    assert pool.route is None
    assert isinstance(pool.settings, PoolSettings)
    assert isinstance(pool.state, PoolState)
    return pool.settings, pool.state.members


def routes(apps: tuple[Application, ...]) -> dict[str, Route]:
    state = apps[0].state
    assert isinstance(state, DoorState)
    return {f"{r.tenant}.v{r.version}": r for r in state.routes}


def test_tenants_of_one_pool_share_one_application(sharing: Want, version: Build, now: datetime) -> None:
    """Each is a member with its own replica, key and share; the door forwards to it for both."""
    want = sharing(version(1, State.ACTIVE), foreign(version(1, State.ACTIVE)))
    apps = applications(want, EMPTY, now)
    assert [app.name for app in apps] == ["door", "shared.small"]
    settings, members = pool_of(apps)
    assert (settings.engine, settings.context_length, settings.max_concurrent) == ("fake", 64, 4)
    assert [(m.tenant, m.status, m.weight) for m in members] == [
        ("acme", "serving", 2),
        ("globex", "serving", 2),
    ]
    for route in routes(apps).values():
        assert (route.app, route.status, route.max_held) == ("shared.small", "serving", 4 + HELD)
        assert not route.affinity


def test_a_rotation_in_a_pool_adds_a_member_and_verifies_it_by_its_url(
    sharing: Want, version: Build, now: datetime
) -> None:
    """Settings stay as they were; the new version is asked at the URL that clients will use."""
    before = applications(sharing(version(1, State.ACTIVE)), EMPTY, now)
    want = sharing(
        version(1, State.ACTIVE),
        version(2, State.STAGED),
        pools={"small": {"slots": 8}},
        serve_url="http://s",
    )
    [apply] = plan(want, standing(before, now), now)
    assert isinstance(apply, Apply)
    assert [m.version for m in pool_of(apply.applications)[1]] == [1, 2]
    assert pool_of(apply.applications)[0] == pool_of(before)[0]
    assert routes(apply.applications)["acme.v2"].app == "shared.small"
    [verify] = plan(want, standing(apply.applications, now), now)
    assert isinstance(verify, Verify)
    assert verify.endpoint == "http://s/acme/smol/v2"


def test_a_member_leaves_when_it_refuses_and_is_idle(sharing: Want, version: Build, now: datetime) -> None:
    """First gone, then read as idle, then out; the other tenant's member is not touched by any of it."""
    old, other = version(1, State.ACTIVE), foreign(version(1, State.ACTIVE))
    apps = applications(sharing(old, other), EMPTY, now)
    ended = sharing(old.model_copy(update={"state": State.COMPROMISED}), other)
    idle = {Ref("acme", "smol", 1): Usage(source="d", tokens=0, in_flight=0)}
    busy = {Ref("acme", "smol", 1): Usage(source="d", tokens=0, in_flight=1)}
    told = applications(ended, standing(apps, now, usage=idle), now)
    assert [m.status for m in pool_of(told)[1]] == ["gone", "serving"]
    held = applications(ended, standing(told, now, usage=busy), now)
    assert [m.status for m in pool_of(held)[1]] == ["gone", "serving"]
    left = applications(ended, standing(told, now, usage=idle), now)
    assert [m.tenant for m in pool_of(left)[1]] == ["globex"]
    assert routes(told)["acme.v1"].status == "gone"
    assert list(routes(left)) == ["globex.v1"]
    assert left[0].state.model_dump()["ended"] == ({"tenant": "acme", "model": "smol", "up_to": 1},)


def test_a_pool_without_members_goes(sharing: Want, version: Build, now: datetime) -> None:
    """And with it its settings: the next one is started as its members then need it."""
    apps = applications(sharing(version(1, State.ACTIVE)), EMPTY, now)
    ended = sharing(version(1, State.COMPROMISED))
    told = applications(ended, standing(apps, now), now)
    usage = {Ref("acme", "smol", 1): Usage(source="d", tokens=0)}
    assert [a.name for a in applications(ended, standing(told, now, usage=usage), now)] == ["door"]


@pytest.mark.parametrize(
    ("field", "value"), [("engine", "torch"), ("dtype", "float32"), ("context_length", 65)]
)
def test_a_model_that_a_pool_cannot_serve_is_given_up_with_the_reason(
    sharing: Want, version: Build, now: datetime, field: str, value: object
) -> None:
    """Before it is a member; who is in already stays, whatever became of the records."""
    want = sharing(version(1, State.ACTIVE))
    apps = applications(want, EMPTY, now)
    odd = want.models[1].model_copy(update={field: value})
    both = replace(
        want, models=(want.models[0], odd), versions=(*want.versions, foreign(version(1, State.STAGED)))
    )
    [failure] = [a for a in plan(both, standing(apps, now), now) if not isinstance(a, Apply)]
    assert isinstance(failure, FailVersion)
    assert (failure.ref.tenant, "choose another pool" in failure.reason) == ("globex", True)
    changed = replace(want, models=(want.models[0].model_copy(update={field: value}), want.models[1]))
    assert len(pool_of(applications(changed, standing(apps, now), now))[1]) == 1


def test_a_failed_pool_is_deployed_anew_for_those_in_use(
    sharing: Want, version: Build, now: datetime
) -> None:
    """A staged version alone is given up instead, as with an application of its own."""
    want = sharing(version(1, State.ACTIVE), foreign(version(1, State.STAGED)))
    failed = standing(applications(want, EMPTY, now), now, AppStatus.DEPLOY_FAILED)
    assert plan(want, failed, now) == []
    [out] = plan(want, failed, now + REDEPLOY_AFTER)
    assert isinstance(out, Apply)
    assert [app.name for app in out.applications] == ["door"]
    alone = sharing(version(1, State.STAGED))
    seen = standing(applications(alone, EMPTY, now), now, AppStatus.DEPLOY_FAILED)
    [failure] = plan(alone, seen, now + REDEPLOY_AFTER)
    assert isinstance(failure, FailVersion)


@pytest.mark.parametrize(
    ("scaling", "affinity"), [({"min_replicas": 0}, False), ({"min_replicas": 1, "max_replicas": 3}, True)]
)
def test_what_sleeps_or_is_several_has_no_route(
    desired: Want, version: Build, model: ModelRead, now: datetime, scaling: dict[str, int], affinity: bool
) -> None:
    """The door is told to forward, and for several replicas to keep alike prompts together."""
    serving = Serving(autoscaling=Autoscaling(**scaling))
    want = desired(version(1, State.ACTIVE), models=(model.model_copy(update={"serving": serving}),))
    door, app = applications(want, EMPTY, now)
    assert app.route is None
    assert isinstance(app.settings, EngineSettings)
    assert app.settings.autoscaling == serving.autoscaling
    route = routes((door,))["acme.v1"]
    assert (route.app, route.affinity) == ("acme.smol.v1", affinity)
    assert route.request_timeout_s == model.policy.longest_request_s
    # What stands decides, should the record ever say otherwise.
    plain = replace(want, models=(model,))
    assert plan(plain, standing((door, app), now), now) == []


def test_the_record_and_the_operator_decide_the_settings(
    desired: Want, version: Build, model: ModelRead, now: datetime
) -> None:
    """Ranks, devices and batch from the record; cache and pool sizes from the command line."""
    serving = Serving(tensor_parallel=2, pipeline_parallel=3, num_gpus=1, max_concurrent=5)
    cache = Cache(folder="/cache")
    models = (model.model_copy(update={"serving": serving}),)
    _, app = applications(desired(version(1, State.ACTIVE), models=models, cache=cache), EMPTY, now)
    found = app.settings
    assert isinstance(found, EngineSettings)
    assert (found.tensor_parallel, found.pipeline_parallel, found.num_gpus) == (2, 3, 1)
    assert (found.max_concurrent, found.cache, app.route) == (5, cache, "/acme/smol/v1")
    shared = (model.model_copy(update={"serving": SHARED}),)
    pools = dict([parse_pool("small=slots=4,host_bytes=1000,num_gpus=0.5")])
    apps = applications(
        desired(version(1, State.ACTIVE), models=shared, pools=pools, cache=cache), EMPTY, now
    )
    settings, _ = pool_of(apps)
    assert (settings.slots, settings.host_bytes, settings.num_gpus) == (4, 1000, 0.5)
    assert settings.cache == cache


@pytest.mark.parametrize(
    "text", ["small=slots=0", "small=places=4", "=slots=4", "Small=slots=4", "small=slots"]
)
def test_a_pool_that_is_none_is_refused_at_the_start(text: str) -> None:
    """Not when the first member comes."""
    with pytest.raises(SetupError, match="slots=4"):
        parse_pool(text)
