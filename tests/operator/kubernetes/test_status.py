"""The status of a resource: true in every combination of states, and written only when it changes."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.operator.kubernetes.conftest import Kubernetes
from tests.operator.kubernetes.objects import encrypted_model
from tests.operator.kubernetes.worlds import (
    ARTIFACT,
    PLACES,
    T0,
    calm,
    deployed,
    knowledge,
    record,
    resource,
    serving,
    version,
    versions,
)

from anamorph import errors
from anamorph.wire.admin import Autoscaling, Serving
from anamorph.wire.serving import DoorState
from anamorph.wire.states import State
from anamorph_operator.applications import DOOR
from anamorph_operator.begin import BASE_OUTSIDE
from anamorph_operator.kubernetes.assignment import assign
from anamorph_operator.kubernetes.conditions import NEEDED, Known, verdicts
from anamorph_operator.kubernetes.resources.definition import ENCRYPTED_MODEL
from anamorph_operator.kubernetes.resources.encrypted_model import CONDITIONS, EncryptedModelStatus
from anamorph_operator.kubernetes.resources.objects import EncryptedModel
from anamorph_operator.kubernetes.resources.part import GROUP, VERSION
from anamorph_operator.kubernetes.status import cluster_status, differs, model_status
from anamorph_operator.kubernetes.trouble import Problem, of_key_service
from anamorph_operator.state import Application, AppStatus, Check, Deployed, Job, Observed, Outcome, Ref

LATER = T0 + timedelta(hours=1)


def status(known: Known, of: EncryptedModel | None = None, now: datetime = T0) -> EncryptedModelStatus:
    return model_status(of or resource(), known, PLACES, now)


def said(known: Known) -> dict[str, tuple[str, str]]:
    """Status and reason of each condition."""
    return {kind: (one.status, one.reason) for kind, one in verdicts(known).items()}


def active(number: int = 1, **fields: Any) -> Any:
    return version(number, State.ACTIVE, artifact=ARTIFACT, activated_at=T0, **fields)


def serving_well(**fields: Any) -> Known:
    one = active(endpoint="https://main.example.com/acme/chat/v1")
    there = Observed({deployed(one).name: deployed(one)})
    return replace(Known(record(resource()), (one,), there), **fields)


@calm
@given(knowledge())
def test_there_is_always_a_status_that_the_definition_takes(known: Known) -> None:
    """Whatever the states, also such as never meet; each condition once, ``Ready`` first."""
    found = status(known)
    assert tuple(one.type for one in found.conditions) == CONDITIONS
    assert EncryptedModelStatus.model_validate(json.loads(json.dumps(found.manifest()))) == found


@calm
@given(knowledge(), knowledge())
def test_a_model_is_ready_if_all_that_it_needs_is_there(before: Known, known: Known) -> None:
    of = replace(resource(), status=status(before))
    conditions = {one.type: one for one in status(known, of).conditions}
    needed = [conditions[kind].status for kind in NEEDED]
    assert (conditions["Ready"].status == "True") == (needed == ["True"] * 4)
    if conditions["Ready"].status != "True":
        first = next(conditions[kind] for kind in NEEDED if conditions[kind].status != "True")
        assert (conditions["Ready"].status, conditions["Ready"].reason) == (first.status, first.reason)


@calm
@given(knowledge(), knowledge(), st.timedeltas(timedelta(0), timedelta(days=9)))
def test_a_time_moves_if_and_only_if_its_status_does(before: Known, known: Known, later: timedelta) -> None:
    first = status(before)
    second = status(known, replace(resource(), status=first), LATER + later)
    for old, new in zip(first.conditions, second.conditions, strict=True):
        moved = new.last_transition_time != old.last_transition_time
        assert moved == (new.status != old.status)


@calm
@given(knowledge(), knowledge())
def test_a_status_that_is_written_needs_no_other(before: Known, known: Known) -> None:
    """Computed again from what was written, at any later time, it is the same."""
    of = replace(resource(), status=status(before))
    written = status(known, of)
    again = status(known, replace(of, status=written), LATER)
    assert not differs(written, again)


@calm
@given(versions(most=14))
def test_the_newest_ten_versions_are_listed(found: Any) -> None:
    listed = [one.version for one in status(Known(versions=found)).versions]
    assert listed == sorted((one.version for one in found), reverse=True)[:10]


def test_a_model_that_is_served_is_ready() -> None:
    found = status(serving_well())
    assert said(serving_well()) == {
        "Ready": ("True", "Ready"),
        "KeyIssued": ("True", "Issued"),
        "Materialized": ("True", "Published"),
        "Verified": ("True", "Activated"),
        "Serving": ("True", "Running"),
        "Rotating": ("False", "Settled"),
        "Draining": ("False", "Settled"),
        "Degraded": ("False", "Settled"),
    }
    assert (found.active_version, found.endpoint) == (1, "https://main.example.com/acme/chat/v1")


FIRST = version(1, State.MATERIALIZING)
STAGED = version(1, State.STAGED, artifact=ARTIFACT)
REF = Ref("acme", "chat", 1)
FAILED = version(1, State.FAILED, failure="it does not fold")
NOTHING = Observed({})


def checked(outcome: Outcome) -> Observed:
    return Observed({}, checks={REF: Check(outcome, 1, T0)})


REASONS: dict[str, tuple[Known, str, tuple[str, str]]] = {
    "no record": (Known(), "KeyIssued", ("False", "Pending")),
    "no tenant": (Known(troubles={Problem.TENANT_UNKNOWN: ""}), "KeyIssued", ("False", "TenantUnknown")),
    "a quota": (Known(troubles={Problem.QUOTA_EXCEEDED: ""}), "KeyIssued", ("False", "QuotaExceeded")),
    "a foreign namespace": (
        Known(troubles={Problem.NAMESPACE_NOT_BOUND: ""}),
        "KeyIssued",
        ("False", "NamespaceNotBound"),
    ),
    "no key service": (
        Known(troubles={Problem.KEY_SERVICE_AWAY: ""}),
        "KeyIssued",
        ("Unknown", "KeyServiceAway"),
    ),
    "no job": (Known(versions=(FIRST,), observed=NOTHING), "Materialized", ("False", "Waiting")),
    "no room": (
        Known(versions=(FIRST,), troubles={Problem.NO_ROOM: "8 GiB are missing"}),
        "Materialized",
        ("False", "NoRoom"),
    ),
    "a job": (
        Known(versions=(FIRST,), observed=Observed({}, jobs={REF: Job(True, 1)})),
        "Materialized",
        ("False", "Folding"),
    ),
    "a refused base": (
        Known(versions=(FAILED.model_copy(update={"failure": BASE_OUTSIDE}),)),
        "Materialized",
        ("False", "BaseRefused"),
    ),
    "a failed job": (Known(versions=(FAILED,)), "Materialized", ("False", "Failed")),
    "a failed job after its key": (Known(versions=(FAILED,)), "KeyIssued", ("True", "Issued")),
    "an old version that is over": (
        Known(versions=(version(1, State.RETIRED), version(2, State.PENDING, key_id=None))),
        "KeyIssued",
        ("False", "Pending"),
    ),
    "not probed": (Known(versions=(STAGED,), observed=NOTHING), "Verified", ("False", "Probing")),
    "another answer": (
        Known(versions=(STAGED,), observed=checked(Outcome.DIFFERENT)),
        "Verified",
        ("False", "Different"),
    ),
    "no answer": (
        Known(versions=(STAGED,), observed=checked(Outcome.UNREACHABLE)),
        "Verified",
        ("False", "Unreachable"),
    ),
    "no application": (Known(versions=(active(),), observed=NOTHING), "Serving", ("False", "Deploying")),
    "no dashboard": (
        Known(versions=(active(),), observed=Observed(None)),
        "Serving",
        ("Unknown", "ClusterAway"),
    ),
    "no cluster": (Known(versions=(active(),)), "Serving", ("Unknown", "ClusterAway")),
    "a full cluster": (Known(troubles={Problem.CLUSTER_FULL: ""}), "Serving", ("False", "ClusterFull")),
    "suspended": (Known(versions=(version(1, State.SUSPENDED),)), "Serving", ("False", "Suspended")),
    "revoked": (Known(versions=(version(1, State.COMPROMISED),)), "Serving", ("False", "Ended")),
    "asleep": (
        serving_well(record=record(resource(), serving=Serving(autoscaling=Autoscaling(min_replicas=0)))),
        "Serving",
        ("True", "OnDemand"),
    ),
    "a rotation": (
        serving_well(versions=(active(1), version(2, State.MATERIALIZING))),
        "Rotating",
        ("True", "Folding"),
    ),
    "a first version": (Known(versions=(FIRST,)), "Rotating", ("False", "Settled")),
    "a move without room": (
        serving_well(troubles={Problem.NO_ROOM: "not yet"}),
        "Rotating",
        ("False", "NoRoom"),
    ),
    "draining": (
        serving_well(versions=(active(2), version(1, State.DRAINING))),
        "Draining",
        ("True", "Draining"),
    ),
    "a failed rotation": (
        serving_well(versions=(active(1), version(2, State.FAILED, failure="why"))),
        "Degraded",
        ("True", "Failed"),
    ),
    "an application that is down": (
        Known(versions=(active(),), observed=NOTHING),
        "Degraded",
        ("True", "NotAnswering"),
    ),
    "a refused change": (
        serving_well(troubles={Problem.QUOTA_EXCEEDED: "fewer GPUs"}),
        "Degraded",
        ("True", "QuotaExceeded"),
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_a_condition_says_in_one_word_why(case: str) -> None:
    known, kind, expected = REASONS[case]
    conditions = {one.type: one for one in status(known).conditions}
    assert (conditions[kind].status, conditions[kind].reason) == expected


def test_a_failed_rotation_leaves_a_model_ready() -> None:
    known, _, _ = REASONS["a failed rotation"]
    assert said(known)["Ready"] == ("True", "Ready")


def test_while_the_key_service_is_away_what_it_said_stays() -> None:
    """What is served goes on, and nothing of a new generation has been acted on."""
    before = status(serving_well())
    of = replace(resource(metadata={"generation": 7}), status=before)
    away = Known(troubles={Problem.KEY_SERVICE_AWAY: "connection refused"})
    assert not differs(before, status(away, of, LATER))


def test_a_status_says_which_generation_it_is_of() -> None:
    found = status(serving_well(), resource(metadata={"generation": 7}))
    assert found.observed_generation == 7
    assert {one.observed_generation for one in found.conditions} == {7}


def test_each_version_says_where_it_lies() -> None:
    """By its endpoint, then by the status, then by the spec: so a move changes nothing that stands."""
    first = status(Known(versions=(version(1, State.PENDING),)))
    assert [one.serving_cluster for one in first.versions] == ["main"]
    of = replace(resource(servingCluster="next"), status=first)
    moved = status(Known(versions=(version(1, State.STAGED), version(2, State.PENDING))), of)
    assert [(one.version, one.serving_cluster) for one in moved.versions] == [(2, "next"), (1, "main")]


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (errors.Unavailable("away"), Problem.KEY_SERVICE_AWAY),
        (errors.Unauthenticated("who"), Problem.KEY_SERVICE_AWAY),
        (errors.NotFound("no tenant"), Problem.TENANT_UNKNOWN),
        (errors.Conflict("too many", code="quota_exceeded"), Problem.QUOTA_EXCEEDED),
        (errors.Conflict("in flight", code="rotation_in_flight"), None),
        (errors.TooManyRequests("later"), None),
        (errors.Forbidden("no"), Problem.REFUSED),
        (errors.Unprocessable("grace"), Problem.REFUSED),
    ],
)
def test_an_answer_of_the_key_service_is_a_value(error: errors.ServiceError, problem: Problem | None) -> None:
    assert list(of_key_service(error)) == ([] if problem is None else [problem])


def door(state: AppStatus) -> Observed:
    return Observed({DOOR: Deployed(DOOR, state, Application(DOOR, "/", None, DoorState()), T0, "why")})


CLUSTER_REASONS: dict[str, tuple[Observed | None, str | None, tuple[str, str]]] = {
    "running": (door(AppStatus.RUNNING), None, ("True", "Running")),
    "deploying": (door(AppStatus.DEPLOYING), None, ("False", "Deploying")),
    "nothing yet": (Observed({}), None, ("False", "Deploying")),
    "failed": (door(AppStatus.DEPLOY_FAILED), None, ("False", "Failed")),
    "away": (Observed(None), None, ("Unknown", "ClusterAway")),
    "never seen": (None, None, ("Unknown", "ClusterAway")),
    "refused": (door(AppStatus.RUNNING), "KubeRay is not installed", ("False", "Refused")),
}


@pytest.mark.parametrize("case", CLUSTER_REASONS)
def test_a_cluster_says_in_one_word_why(case: str) -> None:
    observed, trouble, expected = CLUSTER_REASONS[case]
    of = serving()
    urls = ("http://main", "https://main.example.com")
    found = cluster_status(of, assign(of, [resource()], [], PLACES), observed, urls, T0, trouble)
    first = found.conditions[0]
    assert (first.type, (first.status, first.reason)) == ("Ready", expected)
    again = cluster_status(
        replace(of, status=found), assign(of, [resource()], [], PLACES), observed, urls, LATER, trouble
    )
    assert not differs(found, again)


def test_a_cluster_says_what_it_has_room_for() -> None:
    of = serving(maxApplications=1)
    both = [resource("a"), resource("b", metadata={"creationTimestamp": "2026-01-02T00:00:00Z"})]
    for resources, left, models in ((both[:0], "True", 0), (both[:1], "False", 1), (both, "False", 1)):
        found = cluster_status(of, assign(of, resources, [], PLACES), Observed({}), ("u", "u"), T0)
        assert {one.type: one.status for one in found.conditions}["CapacityLeft"] == left
        assert found.models == models
    assert "acme/b" in found.conditions[1].message


@pytest.mark.real
def test_the_api_server_takes_a_status_and_gives_it_back(kubernetes: Kubernetes) -> None:
    """So that what was written does not differ from what is computed."""
    namespace = kubernetes.namespace()
    kubernetes.create(ENCRYPTED_MODEL, namespace, encrypted_model())
    written = status(serving_well(troubles={Problem.QUOTA_EXCEEDED: "x" * 2000}))
    body = kubernetes.objects.patch_namespaced_custom_object_status(
        GROUP, VERSION, namespace, ENCRYPTED_MODEL.plural, "chat", {"status": written.manifest()}
    )
    assert not differs(EncryptedModel.read(body).status, written)
