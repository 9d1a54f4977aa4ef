"""A resource against a simulated key service, in every order of events that Hypothesis can think of.

The operator dies between any two steps, and its writes of the status get lost. Whatever happens, once
it is left alone the key service has what the resource wants, with no more versions than wishes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from tests.operator.kubernetes.issued import Issued, issued
from tests.operator.kubernetes.worlds import PLACES, T0, record, resource

from anamorph.wire.admin import ModelRead, RotationPolicy
from anamorph.wire.serving import route_prefix
from anamorph.wire.states import ONGOING, TRANSITIONS, State
from anamorph_operator.kubernetes import records
from anamorph_operator.kubernetes.assignment import place
from anamorph_operator.kubernetes.conditions import PREPARING, Known
from anamorph_operator.kubernetes.intent import (
    CreateModel,
    Fail,
    PatchModel,
    PatchPolicy,
    Rotate,
    Step,
    steps,
)
from anamorph_operator.kubernetes.resources.objects import ROTATE, EncryptedModel
from anamorph_operator.kubernetes.status import differs, model_status

NEXT = {State.PENDING: State.MATERIALIZING, State.MATERIALIZING: State.STAGED, State.STAGED: State.ACTIVE}


class World(RuleBasedStateMachine):
    """One resource, its model in the key service, and an operator that may die at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.changes: dict[str, Any] = {}
        self.metadata: dict[str, Any] = {"generation": 1}
        self.resource: EncryptedModel = resource()
        self.record: ModelRead | None = None
        self.versions: dict[int, Issued] = {}
        self.wishes = 1
        self.elsewhere = 0

    # -- the resource ---------------------------------------------------------

    def wish(self, changes: dict[str, Any], **metadata: Any) -> None:
        self.changes |= changes
        self.metadata |= {"generation": self.metadata["generation"] + bool(changes), **metadata}
        read = resource(metadata=dict(self.metadata), **self.changes)
        self.resource = replace(read, status=self.resource.status)
        self.wishes += 1

    @rule(base=st.sampled_from(["s3://bases/a", "s3://bases/b"]))
    def another_base(self, base: str) -> None:
        self.wish({"base.uri": base})

    @rule(most=st.integers(1, 3))
    def more_replicas(self, most: int) -> None:
        self.wish({"serving.autoscaling.maxReplicas": most})

    @rule(cluster=st.sampled_from(list(PLACES)))
    def move(self, cluster: str) -> None:
        self.wish({"servingCluster": cluster})

    @rule(text=st.sampled_from(["one", "two", "x" * 300]))
    def annotate(self, text: str) -> None:
        self.wish({}, annotations={ROTATE: text})

    @rule(period=st.integers(60, 90))
    def another_policy(self, period: int) -> None:
        self.wish({"rotationPolicy.periodSeconds": period})

    # -- the key service ------------------------------------------------------

    @property
    def newest(self) -> Issued | None:
        return self.versions[max(self.versions)] if self.versions else None

    def to(self, one: Issued, state: State) -> None:
        assert state in TRANSITIONS[one.state]
        cluster = place(self.resource, one, PLACES)
        endpoint = PLACES[cluster] + route_prefix(one.tenant, one.model, one.version)
        fields = {"activated_at": T0, "endpoint": endpoint} if state is State.ACTIVE else {}
        self.versions[one.version] = one.model_copy(update={"state": state, **fields})

    def issue(self) -> None:
        assert self.record is not None
        assert not any(one.state in PREPARING for one in self.versions.values()), "one rotation at a time"
        number = self.record.last_version + 1
        self.record = self.record.model_copy(update={"last_version": number})
        one = issued(self.resource, number, State.PENDING)
        one.settings.__dict__.update(records.settings_of(self.record))  # the record's, not the resource's
        self.versions[number] = one

    def apply(self, step: Step) -> None:
        match step:
            case CreateModel():
                self.record = record(self.resource, last_version=0, **dict(step.fields))
            case PatchModel():
                self.record = self.known.model_copy(update=dict(step.changes))
            case PatchPolicy():
                patch = step.patch.model_dump(exclude_unset=True)
                policy = RotationPolicy.model_validate(self.known.policy.model_dump() | patch)
                self.record = self.known.model_copy(update={"policy": policy})
            case Rotate():
                self.issue()
            case Fail():
                self.to(self.versions[step.version], State.FAILED)
            case _:
                raise AssertionError(f"no such step for a resource that stays: {step}")

    @property
    def known(self) -> ModelRead:
        assert self.record is not None
        return self.record

    @precondition(lambda self: self.newest is not None and self.newest.state in NEXT)
    @rule()
    def progress(self) -> None:
        assert self.newest is not None
        if self.newest.state is State.STAGED:
            for one in [v for v in self.versions.values() if v.state is State.ACTIVE]:
                self.to(one, State.DRAINING)
        self.to(self.newest, NEXT[self.newest.state])

    @precondition(lambda self: self.newest is not None and self.newest.state in PREPARING)
    @rule()
    def a_job_fails(self) -> None:
        assert self.newest is not None
        self.to(self.newest, State.FAILED)

    @precondition(lambda self: self.newest is not None and self.newest.state is State.ACTIVE)
    @rule(by=st.sampled_from([State.COMPROMISED, State.SUSPENDED]))
    def end(self, by: State) -> None:
        assert self.newest is not None
        self.to(self.newest, by)

    @precondition(lambda self: self.newest is not None and self.newest.state not in PREPARING)
    @rule()
    def rotate_by_schedule(self) -> None:
        self.issue()
        self.elsewhere += 1

    # -- the operator ---------------------------------------------------------

    def decide(self) -> list[Step]:
        there = list(self.versions.values())
        lies = {one.version: place(self.resource, one, PLACES) for one in there}
        return steps(self.resource, self.record, there, lies)

    def write_status(self) -> bool:
        known = Known(self.record, tuple(self.versions.values()))
        found = model_status(self.resource, known, PLACES, T0)
        changed = differs(self.resource.status, found)
        self.resource = replace(self.resource, status=found)
        return changed

    @rule(until=st.integers(0, 3), lost=st.booleans())
    def turn(self, until: int, lost: bool) -> None:
        """The operator may die in between, and its write of the status may get lost."""
        decided = self.decide()
        if not lost:
            self.write_status()
        for step in decided[:until]:
            self.apply(step)

    def teardown(self) -> None:
        for _ in range(40):
            decided = self.decide()
            self.write_status()
            for step in decided:
                self.apply(step)
            if self.newest is not None and self.newest.state in NEXT:
                self.progress()
            elif not decided:
                break
        self.settled()

    def settled(self) -> None:
        self.write_status()
        assert self.decide() == []
        assert not self.write_status()
        assert self.newest is not None
        assert records.settings_of(self.known) == records.settings(self.resource)
        assert records.issued_under(self.newest) == records.settings(self.resource)
        assert self.known.policy == records.policy(self.resource.spec.rotation_policy)
        assert self.resource.status.rotate_request == self.resource.request
        if self.newest.state in ONGOING:
            assert place(self.resource, self.newest, PLACES) == self.resource.spec.serving_cluster
        assert self.known.last_version <= self.wishes + self.elsewhere


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
