"""Which cluster a version lies on, what one reconciler keeps, and who finds room."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.operator.kubernetes.worlds import (
    ARTIFACT,
    PLACES,
    T0,
    calm,
    record,
    resource,
    serving,
    version,
)

from anamorph.serve.cluster.placement import Node, Room
from anamorph.wire.admin import KeyVersionRead
from anamorph.wire.states import SERVABLE, State
from anamorph_operator.kubernetes.assignment import Assignment, assign, models_on, no_room_for, owners, place
from anamorph_operator.kubernetes.conditions import Known
from anamorph_operator.kubernetes.resources.encrypted_model import EncryptedModelStatus, VersionStatus
from anamorph_operator.kubernetes.resources.objects import EncryptedModel
from anamorph_operator.kubernetes.status import model_status
from anamorph_operator.reconciler import Select
from anamorph_operator.state import Desired, Job, Observed, Ref

MAIN, NEXT = serving("main"), serving("next")


def endpoint(cluster: str, number: int = 1, model: str = "chat") -> str:
    return f"{PLACES[cluster]}/acme/{model}/v{number}"


def seen(of: EncryptedModel, *lies: str) -> EncryptedModel:
    """The resource, whose status says where its versions lie, from the first on."""
    shown = tuple(
        VersionStatus(version=n, state="PENDING", serving_cluster=cluster)
        for n, cluster in enumerate(lies, 1)
    )
    return replace(of, status=EncryptedModelStatus(versions=shown[::-1]))


def made(day: int, name: str, **changes: Any) -> EncryptedModel:
    """A resource that was created on a day of January."""
    return resource(name, metadata={"creationTimestamp": f"2026-01-{day:02}T00:00:00Z"}, **changes)


@pytest.mark.parametrize(
    ("said", "status", "expected"),
    [
        (None, (), "main"),
        (None, ("next",), "next"),
        (endpoint("next"), (), "next"),
        (endpoint("next") + "/", (), "next"),
        (endpoint("next"), ("main",), "main"),
        (endpoint("next"), ("gone",), "next"),
        ("https://gone.example.com/acme/chat/v1", ("next",), "next"),
        ("https://gone.example.com/acme/chat/v1", (), "main"),
        (endpoint("next", 2), (), "main"),
    ],
)
def test_a_version_lies_where_its_status_says_then_its_endpoint_then_its_spec(
    said: str | None, status: tuple[str, ...], expected: str
) -> None:
    one = version(1, State.STAGED, endpoint=said)
    assert place(seen(resource(), *status), one, PLACES) == expected


def test_clusters_under_one_url_are_told_apart_by_the_status() -> None:
    both = {"main": "https://one.example.com", "next": "https://one.example.com/"}
    one = version(1, State.ACTIVE, endpoint="https://one.example.com/acme/chat/v1")
    assert place(seen(resource(), "next"), one, both) == "next"


def test_clusters_that_swap_their_addresses_keep_their_versions() -> None:
    """Until it has been told anew, a version's endpoint names the other cluster."""
    swapped = {"main": PLACES["next"], "next": PLACES["main"]}
    of = seen(resource(), "main")
    one = version(1, State.ACTIVE, endpoint=endpoint("main"))
    kept = [
        assign(cluster, [of], [one], swapped).select((record(of),), (one,))[1] for cluster in (MAIN, NEXT)
    ]
    assert kept == [(one,), ()]


def test_a_model_that_moves_keeps_its_old_version_where_it_is() -> None:
    """Both reconcilers know the model, each its own version; no door speaks for the other's."""
    of = seen(resource(servingCluster="next"), "main", "next")
    old = version(1, State.ACTIVE, endpoint=endpoint("main"))
    new = version(2, State.STAGED)
    model = record(of, last_version=2)
    for cluster, kept, last in ((MAIN, old, 1), (NEXT, new, 2)):
        select: Select = assign(cluster, [of], [old, new], PLACES).select
        models, versions = select((model,), (old, new))
        assert versions == (kept,)
        assert [one.last_version for one in models] == [last]


def test_a_cluster_knows_a_model_until_its_last_version_there_is_forgotten() -> None:
    """Else an application that still stands would go at once, with requests in flight."""
    of = seen(resource(servingCluster="next"), "main", "next")
    new = version(2, State.ACTIVE, endpoint=endpoint("next", 2))
    [model], versions = assign(MAIN, [of], [new], PLACES).select((record(of, last_version=2),), (new,))
    assert (model.last_version, versions) == (1, ())
    forgotten = seen(resource(servingCluster="next"), "next", "next")
    assert assign(MAIN, [forgotten], [new], PLACES).select((record(of),), (new,)) == ((), ())


def test_what_has_no_resource_is_nobodys() -> None:
    other = version(1, State.ACTIVE).model_copy(update={"model": "foreign"})
    model = record(resource()).model_copy(update={"id": "foreign"})
    assert assign(MAIN, [resource()], [other], PLACES).select((model,), (other,)) == ((), ())


def test_the_oldest_resource_owns_a_model_that_several_name() -> None:
    first, second = made(1, "one", model="chat"), made(2, "two", model="chat")
    for order in ([first, second], [second, first]):
        assert owners(order) == {("acme", "chat"): first}


def test_beyond_its_bound_a_cluster_takes_nobody_else() -> None:
    """In the order of creation, whatever the order of the list."""
    models = [made(day, f"m{day}") for day in (3, 1, 2)]
    found = assign(serving(maxApplications=2), models, [], PLACES)
    assert found.full == {("acme", "m3")}
    assert (found.left, models_on(found)) == (0, 2)


def test_a_model_that_finds_no_room_is_not_begun() -> None:
    models = [made(1, "m1"), made(2, "m2")]
    found = assign(serving(maxApplications=1), models, [], PLACES)
    pending = tuple(version(1, State.PENDING, of) for of in models)
    _, versions = found.select(tuple(record(of) for of in models), pending)
    assert [one.model for one in versions] == ["m1"]


def test_who_is_served_already_is_never_refused() -> None:
    """Also not when the bound is lowered; then nobody else comes."""
    old, new = made(1, "old"), made(2, "new")
    there = version(1, State.ACTIVE, new, endpoint=endpoint("main", 1, "new"))
    assert assign(serving(maxApplications=1), [old, new], [there], PLACES).full == {("acme", "old")}


def test_pools_and_baselines_count_once() -> None:
    pool = {"serving.placement": "shared", "serving.pool": "small"}
    members = [made(day, f"p{day}", **pool) for day in (1, 2, 3)]
    of = serving(maxApplications=3, baselines=[{"model": "plain", "uri": "/b", "contextLength": 64}])
    assert assign(of, members, [], PLACES).left == 1
    with_others = assign(of, [*members, made(4, "own"), made(5, "late"), made(6, "p6", **pool)], [], PLACES)
    assert with_others.full == {("acme", "late")}


@calm
@given(
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from([None, *State])), max_size=12), st.integers(1, 6)
)
def test_room_is_shared_fairly(days: list[tuple[int, State | None]], most: int) -> None:
    """Who is served stays; nobody waits while there is room, nor while somebody later got in."""
    models = [made(day, f"m{n}") for n, (day, _) in enumerate(days)]
    there = [version(1, state, of) for of, (_, state) in zip(models, days, strict=True) if state is not None]
    found = assign(serving(maxApplications=most), models, there, PLACES)
    served = {(one.tenant, one.model) for one in there if one.state in SERVABLE}
    assert not found.full & served
    assert len(models) - len(found.full) == min(len(models), max(most, len(served)))
    inside = [of for of in models if of.key not in found.full | served]
    refused = [of for of in models if of.key in found.full]
    order = [(of.metadata.created_at, of.metadata.name) for of in inside]
    assert all(one < (of.metadata.created_at, of.metadata.name) for one in order for of in refused)
    again = assign(serving(maxApplications=most), models[::-1], there, PLACES)
    assert again.full == found.full


@calm
@given(
    st.lists(st.tuples(st.sampled_from(State), st.sampled_from(["main", "next"])), max_size=6), st.booleans()
)
def test_every_version_is_kept_by_one_cluster(of: list[tuple[State, str]], moved: bool) -> None:
    """Never by two, which would serve it twice, and never by none."""
    one = seen(resource(servingCluster="next" if moved else "main"), *(cluster for _, cluster in of))
    versions = tuple(version(n, state) for n, (state, _) in enumerate(of, 1))
    kept = [
        assign(cluster, [one], versions, PLACES).select((record(one),), versions)[1]
        for cluster in (MAIN, NEXT)
    ]
    assert sorted(v.version for some in kept for v in some) == [v.version for v in versions]


def test_what_the_status_says_is_where_the_next_turn_looks() -> None:
    """A version stays where it was first seen, whatever the spec says later."""
    first: tuple[KeyVersionRead, ...] = (version(1, State.PENDING),)
    of = resource()
    of = replace(of, status=model_status(of, Known(versions=first), PLACES, T0))
    moved = replace(resource(servingCluster="next"), status=of.status)
    assert place(moved, first[0], PLACES) == "main"
    again = replace(moved, status=model_status(moved, Known(versions=first), PLACES, T0))
    assert place(again, first[0], PLACES) == "main"


def asked(observed: Observed, full: bool = False, **fields: Any) -> str | None:
    """Why the model cannot move to *next*, where nothing else is wanted."""
    of = resource(servingCluster="next")
    target = Assignment("next", {of.key: of}, PLACES, frozenset({of.key} if full else ()))
    desired = Desired((), (record(of),), (), "http://next")
    return no_room_for(target, of, record(of, **fields), desired, observed, T0 + timedelta(days=1))


def test_a_move_waits_until_it_fits() -> None:
    """The same numbers as for any version that is begun."""
    node = Node("a", Room(cpus=1))
    assert asked(Observed({}, cluster=(node,))) is None
    assert "CPUs" in (asked(Observed({}, cluster=())) or "")
    assert "full" in (asked(Observed({}, cluster=(node,)), full=True) or "")
    assert "does not answer" in (asked(Observed(None)) or "")


def test_a_move_counts_what_is_on_its_way() -> None:
    of = resource(servingCluster="next")
    running = version(1, State.MATERIALIZING, resource("other", servingCluster="next"), artifact=ARTIFACT)
    other = record(resource("other"))
    desired = Desired((running,), (record(of), other), (), "http://next")
    observed = Observed({}, cluster=(Node("a", Room(cpus=1)),), jobs={Ref.of(running): Job(True, 1)})
    target = Assignment("next", {of.key: of}, PLACES)
    assert no_room_for(target, of, record(of), desired, observed, T0) is not None
