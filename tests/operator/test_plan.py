"""One decision of the operator per test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

import pytest

from anamorph.wire.admin import KeyVersionRead, ModelRead
from anamorph.wire.serving import DoorState, Usage
from anamorph.wire.states import State
from anamorph_operator.actions import (
    Action,
    Activate,
    Apply,
    DeleteReplica,
    Destroyed,
    FailVersion,
    Readdress,
    ReportUsage,
    Retire,
    StartJob,
    StopJob,
    Verify,
)
from anamorph_operator.applications import REDEPLOY_AFTER, applications
from anamorph_operator.begin import EXIT_REFUSED, Limits, allowed
from anamorph_operator.plan import plan
from anamorph_operator.state import AppStatus, Baseline, Check, Deployed, Desired, Job, Observed, Outcome, Ref

Build = Callable[..., KeyVersionRead]
Want = Callable[..., Desired]
RefOf = Callable[[int], Ref]
Later = Callable[[float], datetime]
RUNNING = AppStatus.RUNNING


def standing(desired: Desired, now: datetime, status: AppStatus = RUNNING) -> Observed:
    """Everything applied that is wanted, in one status."""
    apps = applications(desired, Observed(deployed={}), now)
    return Observed(deployed={app.name: Deployed(app.name, status, app, now) for app in apps})


def others(actions: list[Action]) -> list[Action]:
    return [action for action in actions if not isinstance(action, Apply)]


def test_nothing_to_do_is_an_empty_plan(desired: Want, version: Build, now: datetime) -> None:
    """A system in its desired state is left alone."""
    want = desired(version(1, State.ACTIVE))
    assert plan(want, standing(want, now), now) == []


def test_the_door_is_applied_first_even_with_nothing_to_serve(
    desired: Want, empty: Observed, now: datetime
) -> None:
    """An empty cluster gets the door, so that every path is answered in our error shape."""
    [action] = plan(desired(), empty, now)
    assert isinstance(action, Apply)
    assert [app.name for app in action.applications] == ["door"]


def test_a_new_version_is_materialised(
    desired: Want, version: Build, empty: Observed, now: datetime, ref: RefOf, model: ModelRead
) -> None:
    """PENDING leads to a job."""
    assert others(plan(desired(version(1, State.PENDING)), empty, now)) == [StartJob(ref(1), model)]


def test_a_restarted_operator_takes_up_a_materialising_version(
    desired: Want, version: Build, empty: Observed, now: datetime, ref: RefOf, model: ModelRead
) -> None:
    """MATERIALIZING without a job is started again: its grant died with the former operator."""
    assert others(plan(desired(version(1, State.MATERIALIZING)), empty, now)) == [StartJob(ref(1), model)]


def test_jobs_are_bounded(
    desired: Want, version: Build, empty: Observed, now: datetime, ref: RefOf, model: ModelRead
) -> None:
    """With one job at a time the second version waits, also while the first runs."""
    want = desired(version(1, State.PENDING), version(2, State.PENDING))
    assert others(plan(want, empty, now)) == [StartJob(ref(1), model)]
    assert others(plan(want, replace(empty, jobs={ref(1): Job(True, 1)}), now)) == []


def test_a_failed_job_is_retried_after_a_pause(
    desired: Want, version: Build, empty: Observed, now: datetime, later: Later, ref: RefOf, model: ModelRead
) -> None:
    """A crash is retried with backoff, not at once."""
    want = desired(version(1, State.MATERIALIZING))
    seen = replace(empty, jobs={ref(1): Job(False, 1, 1, now)})
    assert others(plan(want, seen, later(1))) == []
    assert others(plan(want, seen, later(2))) == [StartJob(ref(1), model)]


def test_a_job_that_keeps_failing_fails_its_version(
    desired: Want, version: Build, empty: Observed, later: Later, ref: RefOf
) -> None:
    """Retries are bounded; then the version is FAILED and nothing is started any more."""
    attempts = Limits().job_attempts
    seen = replace(empty, jobs={ref(1): Job(False, attempts, 1, later(0))})
    [action] = others(plan(desired(version(1, State.MATERIALIZING)), seen, later(900)))
    assert isinstance(action, FailVersion)


def test_a_refused_job_is_not_retried(
    desired: Want, version: Build, empty: Observed, later: Later, ref: RefOf
) -> None:
    """Exit status 3 means that another attempt would be refused too."""
    seen = replace(empty, jobs={ref(1): Job(False, 1, EXIT_REFUSED, later(0))})
    [action] = others(plan(desired(version(1, State.MATERIALIZING)), seen, later(900)))
    assert isinstance(action, FailVersion)


def test_a_base_outside_the_allow_list_is_refused(
    desired: Want, version: Build, empty: Observed, now: datetime
) -> None:
    """No job ever reads a folder that the operator was not told to trust."""
    [action] = others(plan(desired(version(1, State.PENDING), allow_base=("/elsewhere",)), empty, now))
    assert isinstance(action, FailVersion)
    assert "allow-list" in action.reason


@pytest.mark.parametrize(
    ("base", "prefix", "verdict"),
    [
        ("/bases/smol", "/bases", True),
        ("/bases", "/bases/", True),
        ("/bases-of-others/smol", "/bases", False),
        ("/bases/../etc", "/bases", False),
        ("s3://models/smol", "s3://models", True),
        ("s3://models/../secret/smol", "s3://models/public", False),
        ("s3://models/public/smol", "s3://models/public/", True),
        ("s3://models/public2/smol", "s3://models/public/", False),
        ("gs://models/smol", "s3://models", False),
        ("/bases/smol", "file:///bases", False),
        ("hf://HuggingFaceTB/SmolLM2@v1.0", "hf://HuggingFaceTB/", True),
        ("hf://HuggingFaceTB/SmolLM2", "hf://HuggingFaceTB/SmolLM2", True),
        ("hf://HuggingFaceTB/SmolLM2@v1.0", "hf://HuggingFaceTB/SmolLM2", False),
        ("hf://HuggingFaceTB/../evil/SmolLM2", "hf://HuggingFaceTB", False),
        ("HuggingFaceTB/SmolLM2", "hf://HuggingFaceTB", False),
    ],
)
def test_the_allow_list_goes_by_path_segments(base: str, prefix: str, verdict: bool) -> None:
    """Neither '..' nor a longer name with the same beginning passes."""
    assert allowed(base, (prefix,)) is verdict


def test_a_job_of_a_cancelled_version_is_stopped(
    desired: Want, version: Build, empty: Observed, now: datetime, ref: RefOf
) -> None:
    """Once a version is FAILED or COMPROMISED its job has no business any more."""
    seen = replace(empty, jobs={ref(1): Job(True, 1)})
    assert others(plan(desired(version(1, State.FAILED)), seen, now)) == [StopJob(ref(1))]


def test_staged_is_deployed_then_verified_then_activated(
    desired: Want, version: Build, now: datetime, empty: Observed, ref: RefOf
) -> None:
    """A version goes live only after the served replica gave the expected answer."""
    staged = version(1, State.STAGED)
    want = desired(staged)
    assert others(plan(want, empty, now)) == []
    up = standing(want, now)
    endpoint = "http://127.0.0.1:8000/acme/smol/v1"
    assert staged.artifact is not None
    assert plan(want, up, now) == [Verify(ref(1), endpoint, staged.require_key_id(), staged.artifact.probe)]
    verified = replace(up, checks={ref(1): Check(Outcome.EQUAL, 1, now)})
    assert plan(want, verified, now) == [Activate(ref(1), endpoint)]


OLD = "https://old.example.com/acme/smol/v1"


@pytest.mark.parametrize("state", [State.ACTIVE, State.DRAINING, State.SUSPENDED])
def test_a_new_address_is_told_of_what_is_served(
    desired: Want, version: Build, now: datetime, ref: RefOf, state: State
) -> None:
    """Without a rotation, and once: told, there is nothing more to do."""
    url = "https://new.example.com"
    want = desired(version(1, state, endpoint=OLD), public_url=url + "/")
    seen = standing(want, now)
    assert plan(want, seen, now) == [Readdress(ref(1), f"{url}/acme/smol/v1")]
    for said in (url, url + "/"):
        told = desired(version(1, state, endpoint=f"{said.rstrip('/')}/acme/smol/v1"), public_url=said)
        assert plan(told, seen, now) == []


@pytest.mark.parametrize("state", [State.ACTIVE, State.DRAINING])
def test_an_address_is_not_told_of_what_does_not_answer_there(
    desired: Want, version: Build, now: datetime, empty: Observed, state: State
) -> None:
    """Its application is not up yet, or the cluster is away."""
    want = desired(version(1, state, endpoint=OLD), public_url="https://new.example.com")
    for seen in (empty, standing(want, now, AppStatus.DEPLOYING), Observed(deployed=None)):
        assert others(plan(want, seen, now)) == []


def test_a_replica_that_answers_otherwise_is_given_up(
    desired: Want, version: Build, now: datetime, ref: RefOf
) -> None:
    """A swapped replica never becomes ACTIVE."""
    want = desired(version(1, State.ACTIVE), version(2, State.STAGED))
    seen = replace(standing(want, now), checks={ref(2): Check(Outcome.DIFFERENT, 1, now)})
    [action] = plan(want, seen, now)
    assert isinstance(action, FailVersion)
    assert action.ref == ref(2)


def test_a_replica_that_its_pool_refuses_is_given_up(desired: Want, version: Build, now: datetime) -> None:
    """At the first probe, instead of twenty: it will not be served whoever asks."""
    want = desired(version(2, State.STAGED))
    seen = replace(standing(want, now), checks={Ref("acme", "smol", 2): Check(Outcome.REFUSED, 1, now)})
    [action] = plan(want, seen, now)
    assert isinstance(action, FailVersion)


def test_a_replica_that_cannot_be_deployed_is_given_up(desired: Want, version: Build, now: datetime) -> None:
    """DEPLOY_FAILED of a staged version fails it; Ray does not try again by itself."""
    want = desired(version(2, State.STAGED))
    seen = standing(want, now, AppStatus.DEPLOY_FAILED)
    [action] = plan(want, seen, now)
    assert isinstance(action, FailVersion)


def test_an_older_staged_version_never_replaces_a_newer_active_one(
    desired: Want, version: Build, now: datetime, ref: RefOf
) -> None:
    """Versions only grow, whatever finishes last."""
    want = desired(version(1, State.STAGED), version(2, State.ACTIVE))
    seen = replace(standing(want, now), checks={ref(1): Check(Outcome.EQUAL, 1, now)})
    [action] = plan(want, seen, now)
    assert isinstance(action, FailVersion)
    assert action.ref == ref(1)


def draining(desired: Want, version: Build, later: Later) -> Desired:
    old = version(1, State.DRAINING, activated_at=later(0), drain_until=later(20))
    return desired(old, version(2, State.ACTIVE, activated_at=later(0)))


def test_draining_ends_after_its_deadline_when_idle(
    desired: Want, version: Build, later: Later, ref: RefOf
) -> None:
    """Not before the deadline, not while a request runs, and then in the key service first."""
    want = draining(desired, version, later)
    idle = replace(standing(want, later(0)), usage={ref(1): Usage(source="p", tokens=0)})
    idle = replace(idle, reported=idle.usage)
    busy = replace(idle, usage={ref(1): Usage(source="p", tokens=0, in_flight=1)})
    assert plan(want, idle, later(19)) == []
    assert plan(want, busy, later(21)) == []
    assert plan(want, idle, later(21)) == [Retire(ref(1))]


def test_a_caller_cannot_hold_up_retirement_for_ever(
    desired: Want, version: Build, later: Later, ref: RefOf
) -> None:
    """One longest request after the deadline the old key goes, in use or not."""
    want = draining(desired, version, later)
    busy = replace(standing(want, later(0)), usage={ref(1): Usage(source="p", tokens=0, in_flight=1)})
    busy = replace(busy, reported=busy.usage)
    assert plan(want, busy, later(31)) == [Retire(ref(1))]


def test_the_last_version_that_answers_is_never_retired(
    desired: Want, version: Build, later: Later, ref: RefOf
) -> None:
    """While the successor is down the old version stays."""
    want = draining(desired, version, later)
    seen = standing(want, later(0))
    assert seen.deployed is not None
    broken = replace(seen.deployed[ref(2).app], status=AppStatus.UNHEALTHY)
    seen = replace(seen, deployed={**seen.deployed, broken.name: broken})
    assert Retire(ref(1)) not in plan(want, seen, later(1000))


def test_a_retired_application_refuses_before_it_goes(
    desired: Want, version: Build, later: Later, ref: RefOf
) -> None:
    """First 'gone' is pushed, then nothing may be in flight, then the application is left out."""
    active = version(1, State.ACTIVE, activated_at=later(0))
    retired = version(1, State.RETIRED, activated_at=later(0), updated_at=later(0))
    serving = standing(desired(active), later(0))
    quiet = replace(serving, usage={ref(1): Usage(source="p", tokens=0)})
    quiet = replace(quiet, reported=quiet.usage)  # idle so far, but a request may come any moment
    [push] = others_are_empty(plan(desired(retired), quiet, later(1)))
    assert ref(1).app in [app.name for app in push.applications]
    refusing = replace(
        serving, deployed={a.name: Deployed(a.name, RUNNING, a, later(1)) for a in push.applications}
    )
    busy = replace(refusing, usage={ref(1): Usage(source="p", tokens=0, in_flight=1)})
    idle = replace(refusing, usage={ref(1): Usage(source="p", tokens=0)})
    assert [a for a in plan(desired(retired), busy, later(999)) if isinstance(a, Apply)] == []
    [remove] = [a for a in plan(desired(retired), idle, later(2)) if isinstance(a, Apply)]
    assert [app.name for app in remove.applications] == ["door"]


def others_are_empty(actions: list[Action]) -> list[Apply]:
    assert others(actions) == []
    return [action for action in actions if isinstance(action, Apply)]


@pytest.mark.parametrize("ended", [State.RETIRED, State.COMPROMISED, State.DESTROY_SCHEDULED])
def test_gone_versions_are_known_to_the_door(
    desired: Want, version: Build, empty: Observed, model: ModelRead, now: datetime, ended: State
) -> None:
    """410, not 404, for a version that was served once."""
    models = (model.model_copy(update={"last_version": 1}),)
    [apply] = others_are_empty(plan(desired(version(1, ended), models=models), empty, now))
    state = apply.applications[0].state.model_dump()
    assert [one["up_to"] for one in state["ended"]] == [1]


@pytest.mark.parametrize(
    ("last", "listed", "up_to"),
    [
        (0, [], None),
        (1, [(1, State.ACTIVE)], None),
        (3, [(3, State.ACTIVE)], 3),
        (3, [], 3),
        (3, [(1, State.SUSPENDED), (3, State.ACTIVE)], 3),
        (2, [(2, State.ACTIVE), (3, State.PENDING)], 2),  # begun since the models were read
    ],
)
def test_versions_of_the_past_are_known_to_the_door_by_the_models_last_one(
    desired: Want,
    version: Build,
    model: ModelRead,
    now: datetime,
    last: int,
    listed: list[tuple[int, State]],
    up_to: int | None,
) -> None:
    """They are not listed: whatever has no route, up to there, has ended. Where all have one, none has."""
    models = (model.model_copy(update={"last_version": last}),)
    want = desired(*(version(*one) for one in listed), models=models)
    door = applications(want, Observed(deployed={}), now)[0].state
    assert isinstance(door, DoorState)
    assert [ended.up_to for ended in door.ended] == ([] if up_to is None else [up_to])


def test_a_version_that_is_being_prepared_has_not_ended(
    desired: Want, version: Build, model: ModelRead, now: datetime
) -> None:
    """It has no route yet and is the model's last: the door must not call it gone."""
    nameless = version(2, State.PENDING, key_id=None, kcv=None, vocab_kcv=None, public_key=None)
    models = (model.model_copy(update={"last_version": 2}),)
    door = applications(desired(nameless, models=models), Observed(deployed={}), now)[0].state
    assert isinstance(door, DoorState)
    assert [ended.up_to for ended in door.ended] == [1]


def test_destruction_follows_application_files_key(
    desired: Want, version: Build, later: Later, ref: RefOf
) -> None:
    """The key row is erased only when neither application nor files are left, and not before its time."""
    doomed = version(1, State.DESTROY_SCHEDULED, destroy_at=later(60))
    want = desired(doomed)
    seen = standing(want, later(0))
    assert doomed.artifact is not None
    assert plan(want, seen, later(59)) == []
    assert plan(want, seen, later(60)) == [DeleteReplica(ref(1), doomed.artifact.replica)]
    assert plan(want, replace(seen, deleted=frozenset({ref(1)})), later(60)) == [Destroyed(ref(1))]
    assert plan(want, replace(seen, deployed=None), later(60)) == []


def test_usage_is_reported_once_per_reading(desired: Want, version: Build, now: datetime, ref: RefOf) -> None:
    """Only news is reported."""
    want = desired(version(1, State.ACTIVE))
    usage = Usage(source="p1", tokens=7)
    seen = replace(standing(want, now), usage={ref(1): usage})
    assert plan(want, seen, now) == [ReportUsage(ref(1), usage)]
    assert plan(want, replace(seen, reported={ref(1): usage}), now) == []


def test_nothing_is_concluded_while_ray_is_away(desired: Want, version: Build, later: Later) -> None:
    """No application, no retirement and no destruction is decided blindly."""
    doomed = version(3, State.DESTROY_SCHEDULED, destroy_at=later(0))
    want = replace(draining(desired, version, later), versions=(doomed,))
    assert plan(want, Observed(deployed=None), later(1000)) == []


def test_an_application_of_an_unknown_version_is_left_alone(
    desired: Want, version: Build, now: datetime
) -> None:
    """A key service restored without a version does not take that version's service down."""
    seen = standing(desired(version(1, State.ACTIVE), version(2, State.ACTIVE)), now)
    [apply] = others_are_empty(plan(desired(version(1, State.ACTIVE)), seen, now))
    assert "acme.smol.v2" in [app.name for app in apply.applications]


def test_a_policy_change_never_replaces_a_serving_application(
    desired: Want, version: Build, now: datetime
) -> None:
    """Arguments of what stands stay: Ray would replace it in place otherwise."""
    want = desired(version(1, State.ACTIVE))
    seen = standing(want, now)
    patched = want.models[0].model_copy(update={"context_length": 32})
    assert plan(replace(want, models=(patched,)), seen, now) == []


def test_a_failed_application_in_use_is_deployed_anew(desired: Want, version: Build, now: datetime) -> None:
    """Taken out for one write after a pause, then back: Ray alone would leave it failed."""
    want = desired(version(1, State.ACTIVE), baselines=(Baseline("smol", "/bases/smol", 64),))
    failed = standing(want, now, AppStatus.DEPLOY_FAILED)
    assert plan(want, failed, now) == []
    [out] = others_are_empty(plan(want, failed, now + REDEPLOY_AFTER))
    assert [app.name for app in out.applications] == ["door"]


def test_a_version_without_its_key_waits_for_the_key_service(
    desired: Want, version: Build, now: datetime, empty: Observed
) -> None:
    """While the key-management service is away, a rotation stands in PENDING: no job is started for it."""
    waiting = version(1, State.PENDING)
    nameless = waiting.model_copy(update={"key_id": None, "kcv": None, "vocab_kcv": None, "public_key": None})
    assert any(isinstance(action, StartJob) for action in plan(desired(waiting), empty, now))
    assert not any(isinstance(action, StartJob) for action in plan(desired(nameless), empty, now))
