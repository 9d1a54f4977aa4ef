"""What is done in the key service for a resource: step by step, and always to the same end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.operator.kubernetes.issued import Issued, issued
from tests.operator.kubernetes.worlds import calm, record, resource, version

from anamorph.wire.admin import KeyVersionRead, ModelCreate, ModelRead, RotationPolicy
from anamorph.wire.states import TRANSITIONS, State
from anamorph_operator.kubernetes import records
from anamorph_operator.kubernetes.intent import (
    CreateModel,
    Destroy,
    Fail,
    PatchModel,
    PatchPolicy,
    Revoke,
    Rotate,
    Step,
    answered,
    removal,
    steps,
)
from anamorph_operator.kubernetes.resources.encrypted_model import EncryptedModelStatus, VersionStatus
from anamorph_operator.kubernetes.resources.objects import ROTATE, EncryptedModel

SHARED = {"serving.placement": "shared", "serving.pool": "small", "serving.tokensPerSecond": 500}
ASLEEP = {"serving.autoscaling.minReplicas": 0, "serving.autoscaling.idleSeconds": 60}


def changed(changes: dict[str, Any]) -> EncryptedModel:
    """The resource, with these fields of its spec."""
    return resource(**changes)


def listed(of: EncryptedModel, *versions: KeyVersionRead, request: str | None = None) -> EncryptedModel:
    """The resource, with these versions in its status."""
    shown = tuple(
        VersionStatus(version=v.version, state=v.state.value, serving_cluster="main") for v in versions
    )
    return replace(of, status=EncryptedModelStatus(versions=shown, rotate_request=request))


def done(of: EncryptedModel, *versions: KeyVersionRead, **fields: Any) -> list[Step]:
    """The steps for a record that is as wanted, and these versions, all on the cluster *main*."""
    last = max((one.version for one in versions), default=0)
    lies = {one.version: "main" for one in versions}
    return steps(of, record(of, last_version=last, **fields), versions, lies)


def served(of: EncryptedModel, number: int = 1) -> Issued:
    return issued(of, number, State.ACTIVE)


def test_a_model_that_is_unknown_is_registered() -> None:
    """With exactly what the resource says, in the key service's words."""
    policy = {"rotationPolicy.periodSeconds": 86400, "rotationPolicy.clockSkewSeconds": 5}
    of = changed({**policy, **SHARED, "tokenizerDigest": "sha256:" + "1" * 64})
    [step] = steps(of, None, (), {})
    assert isinstance(step, CreateModel)
    made = ModelCreate.model_validate(dict(step.fields))
    assert (made.id, made.base, made.vocab_size) == ("chat", "s3://bases/smollm2", 49152)
    assert (made.policy.period_s, made.policy.clock_skew_s) == (86400, 5)
    assert (made.serving.pool, made.serving.tokens_per_s) == ("small", 500)
    assert made.tokenizer_digest == "sha256:" + "1" * 64


def test_a_resource_with_defaults_is_a_record_with_defaults() -> None:
    [step] = steps(resource(), None, (), {})
    assert isinstance(step, CreateModel)
    made = ModelCreate.model_validate(dict(step.fields))
    assert made == ModelCreate(id="chat", base="s3://bases/smollm2", vocab_size=49152, context_length=2048)


def test_a_digest_of_the_base_is_said_only_if_there_is_one() -> None:
    assert "base_digest" not in records.creation(resource())
    digest = "sha256:" + "2" * 64
    assert records.creation(changed({"base.digest": digest}))["base_digest"] == digest


def test_a_model_is_called_as_the_resource_says() -> None:
    [step] = steps(resource("chat-team", model="chat"), None, (), {})
    assert isinstance(step, CreateModel)
    assert step.fields["id"] == "chat"


def test_the_first_version_is_asked_for() -> None:
    [step] = done(resource())
    assert isinstance(step, Rotate)


def test_a_settled_model_needs_nothing() -> None:
    of = resource()
    assert done(listed(of, served(of)), served(of)) == []


CHANGES: list[tuple[dict[str, Any], set[str]]] = [
    ({"base.uri": "s3://bases/other"}, {"base"}),
    ({"base.digest": "sha256:" + "3" * 64}, {"base_digest"}),
    ({"dtype": "float32", "contextLength": 64}, {"dtype", "context_length"}),
    ({"serving.engine": "vllm"}, {"engine"}),
    ({"serving.numGpus": 1}, {"serving"}),
    (ASLEEP, {"serving"}),
]


@pytest.mark.parametrize(("change", "fields"), CHANGES)
def test_a_change_of_the_model_is_a_change_of_its_record_and_a_rotation(
    change: dict[str, Any], fields: set[str]
) -> None:
    """In that order: the new version is issued under the new record."""
    before, of = resource(), resource(**change)
    patch, rotate = steps(of, record(before, last_version=1), [served(before)], {1: "main"})
    assert isinstance(patch, PatchModel)
    assert set(patch.changes) == fields
    assert isinstance(rotate, Rotate)
    patched = record(before, last_version=1).model_copy(update=dict(patch.changes))
    assert steps(of, patched, [served(before)], {1: "main"}) == [rotate]  # died in between
    assert steps(of, patched, [served(before), issued(of, 2, State.PENDING)], {1: "main", 2: "main"}) == []


def test_a_change_of_the_policy_is_no_rotation() -> None:
    before, of = (
        resource(),
        changed({"rotationPolicy.periodSeconds": 3600, "rotationPolicy.graceSeconds": 1000}),
    )
    [step] = steps(listed(of, served(of)), record(before, last_version=1), [served(of)], {1: "main"})
    assert isinstance(step, PatchPolicy)
    assert step.patch.model_dump(exclude_unset=True) == {"period_s": 3600, "grace_s": 1000}


def test_a_policy_can_be_switched_off() -> None:
    of = resource()
    there = record(of, last_version=1, policy=RotationPolicy(period_s=3600, token_budget=5))
    [step] = steps(of, there, [served(of)], {1: "main"})
    assert isinstance(step, PatchPolicy)
    assert step.patch.model_dump(exclude_unset=True) == {"period_s": None, "token_budget": None}


def test_what_is_being_made_in_vain_is_given_up() -> None:
    """The version that is served stays; the one that nobody wants any more does not hold up the next."""
    before, of = resource(), resource(dtype="float32")
    there = [served(before), issued(before, 2, State.MATERIALIZING)]
    give_up, rotate = steps(of, record(of, dtype="float32", last_version=2), there, {1: "main", 2: "main"})
    assert isinstance(give_up, Fail)
    assert give_up.version == 2
    assert isinstance(rotate, Rotate)


def test_a_version_that_failed_is_not_tried_again_by_itself() -> None:
    of = resource()
    there = [served(of), issued(of, 2, State.FAILED)]
    assert done(listed(of, *there), *there) == []


def test_an_annotation_is_one_rotation() -> None:
    of = resource(metadata={"annotations": {ROTATE: "after the incident"}})
    asked = listed(of, served(of))
    [step] = done(asked, served(of))
    assert isinstance(step, Rotate)
    issued_since = [served(of), issued(of, 2, State.PENDING)]
    assert answered(asked, issued_since) == "after the incident"
    assert done(asked, *issued_since) == []
    assert done(listed(of, *issued_since, request="after the incident"), served(of, 2)) == []


def test_an_annotation_during_a_rotation_waits_for_its_end() -> None:
    of = resource(metadata={"annotations": {ROTATE: "again"}})
    running = [served(of), issued(of, 2, State.STAGED)]
    asked = listed(of, *running)
    assert done(asked, *running) == []
    [step] = done(asked, issued(of, 1, State.DRAINING), served(of, 2))
    assert isinstance(step, Rotate)


def test_a_move_is_a_rotation_once_there_is_room() -> None:
    of = resource(servingCluster="next")
    there = record(of, last_version=1)
    [step] = steps(of, there, [served(of)], {1: "main"})
    assert isinstance(step, Rotate)
    assert steps(of, there, [served(of)], {1: "main"}, may_move=False) == []
    assert steps(of, there, [served(of)], {1: "next"}) == []


def test_a_record_that_is_another_models_is_left_alone() -> None:
    """Clients hold keys and tokenizers for it."""
    of = resource()
    other = record(of, vocab_size=5, profile="permute")
    assert steps(of, other, [], {}) == []
    assert "vocab_size" in (records.mismatch(of, other) or "")
    assert records.mismatch(of, record(of)) is None


def test_versions_that_do_not_belong_to_the_record_are_waited_for() -> None:
    """Record and versions are read one after the other."""
    of = resource(dtype="float32")
    there: ModelRead = record(of, dtype="float32", last_version=3)
    assert steps(of, there, [issued(resource(), 2, State.ACTIVE)], {2: "main"}) == []
    assert steps(of, there, [], {}) == []


def test_a_resource_that_is_made_again_gets_a_version_again() -> None:
    """What was revoked stays revoked, until somebody asks; a new resource is somebody."""
    of = resource()
    over = issued(of, 4, State.DESTROY_SCHEDULED)
    assert [type(step) for step in done(of, over)] == [Rotate]
    revoked = issued(of, 4, State.COMPROMISED)
    assert done(listed(of, revoked), revoked) == []


def test_a_rotation_is_known_by_the_wish_that_it_answers() -> None:
    """The same word for the same wish, another for another."""
    wishes = [
        resource(),
        resource(metadata={"generation": 2}),
        resource(metadata={"annotations": {ROTATE: "x"}}),
    ]
    words = [step.once for of in wishes for step in done(of) if isinstance(step, Rotate)]
    assert len(set(words)) == 3
    assert done(resource()) == done(resource())


@calm
@given(st.lists(st.sampled_from(State), min_size=1, max_size=6))
def test_a_deleted_resource_ends_every_version(states: list[State]) -> None:
    """Each step is one that the key service admits, and in three turns there is nothing left to do."""
    of = resource()
    there = {n: version(n, state) for n, state in enumerate(states, 1)}
    ends = {Fail: State.FAILED, Revoke: State.COMPROMISED, Destroy: State.DESTROY_SCHEDULED}
    for _ in range(3):
        for step in removal(of, list(there.values())):
            assert isinstance(step, Fail | Revoke | Destroy)
            one, to = there[step.version], ends[type(step)]
            assert to in TRANSITIONS[one.state]
            there[step.version] = one.model_copy(update={"state": to})
    assert removal(of, list(there.values())) == []
    assert {one.state for one in there.values()} <= {State.DESTROY_SCHEDULED, State.DESTROYED}
