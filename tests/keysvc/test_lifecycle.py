"""Each call in each state, deadlines, activation, and what the database itself refuses."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.exc import IntegrityError
from sqlmodel import select

from anamorph import errors
from anamorph.keys import TenantKey
from anamorph.wire.admin import (
    Activation,
    Address,
    Failure,
    KeyVersionRead,
    OperationStatus,
    RotationPolicyPatch,
)
from anamorph.wire.states import State
from anamorph_keysvc.scope import PLATFORM
from anamorph_keysvc.service import lifecycle, lookup, materialization, rotation, tenants
from anamorph_keysvc.service.transition import move
from anamorph_keysvc.service.work import Work
from anamorph_keysvc.tables import Audit, KeyVersion, Operation

if TYPE_CHECKING:
    from tests.keysvc.conftest import World

S = State
AT = ("acme", "chat")
DAY = 86400

# What brings a fresh model's version 1 into each state.
ROADS: dict[State, tuple[str, ...]] = {
    S.PENDING: ("rotate",),
    S.MATERIALIZING: ("rotate", "materialize"),
    S.STAGED: ("staged",),
    S.ACTIVE: ("staged", "activate"),
    S.DRAINING: ("staged", "activate", "replace"),
    S.SUSPENDED: ("staged", "activate", "suspend"),
    S.RETIRED: ("staged", "activate", "replace", "wait", "retire"),
    S.COMPROMISED: ("staged", "revoke"),
    S.FAILED: ("rotate", "fail"),
    S.DESTROY_SCHEDULED: ("staged", "activate", "replace", "wait", "retire", "destroy"),
    S.DESTROYED: ("staged", "activate", "replace", "wait", "retire", "destroy", "wait", "destroyed"),
}
# Where each call leads from each state that admits it, all deadlines having passed.
LEADS: dict[str, dict[State, State]] = {
    "materialize": {S.PENDING: S.MATERIALIZING, S.MATERIALIZING: S.MATERIALIZING},
    "activate": {S.STAGED: S.ACTIVE},
    "readdress": {state: state for state in (S.ACTIVE, S.DRAINING, S.SUSPENDED)},
    "suspend": {S.ACTIVE: S.SUSPENDED, S.DRAINING: S.SUSPENDED},
    "resume": {S.SUSPENDED: S.ACTIVE},
    "retire": {S.DRAINING: S.RETIRED},
    "revoke": dict.fromkeys(
        (S.PENDING, S.MATERIALIZING, S.STAGED, S.ACTIVE, S.DRAINING, S.SUSPENDED, S.RETIRED), S.COMPROMISED
    ),
    "fail": {S.PENDING: S.FAILED, S.MATERIALIZING: S.FAILED, S.STAGED: S.FAILED, S.FAILED: S.FAILED},
    "cancel": {S.PENDING: S.FAILED, S.MATERIALIZING: S.FAILED, S.STAGED: S.FAILED},
    "destroy": dict.fromkeys((S.RETIRED, S.COMPROMISED, S.FAILED), S.DESTROY_SCHEDULED),
    "restore": {S.DESTROY_SCHEDULED: S.RETIRED},
    "destroyed": {S.DESTROY_SCHEDULED: S.DESTROYED},
    "release": {state: state for state in (S.STAGED, S.ACTIVE, S.DRAINING)},
}


# What a call says, besides which version it means.
BODIES = {
    "activate": (Activation(endpoint="http://e"),),
    "readdress": (Address(endpoint="https://new"),),
}


def call(world: World, verb: str, model: str = "chat", version: int = 1) -> Any:
    """Make one call, or take one of the longer steps of ``ROADS``."""
    at = ("acme", model, version)
    match verb:
        case "rotate":
            return world.rotate("acme", model)
        case "staged":
            return world.staged("acme", model)
        case "replace":
            return world.active("acme", model)
        case "wait":
            return world.clock.advance(40 * DAY)
        case "materialize":
            return world.do(materialization.materialize, *at, None)
        case "fail":
            return world.do(materialization.fail, None, *at, Failure(reason="broken"))
        case "cancel":
            return world.do(rotation.cancel, "acme", operation(world, model, version).id)
        case "release":
            return world.release_to_client(*at)
        case _:
            transition: Callable[..., Any] = getattr(lifecycle, verb)
            return world.do(transition, *at, None, *BODIES.get(verb, ()))


def operation(world: World, model: str = "chat", version: int = 1) -> Operation:
    with world.service.database.read(PLATFORM) as session:
        return lookup.operation_of(session, lookup.version(session, "acme", model, version))


def read(world: World, model: str = "chat", version: int = 1) -> KeyVersionRead:
    with world.service.database.read(PLATFORM) as session:
        return lookup.version_read(lookup.version(session, "acme", model, version))


def bring(world: World, state: State, model: str = "chat") -> None:
    world.model("acme", model)
    for step in ROADS[state]:
        call(world, step, model)
    assert read(world, model).state is state


@pytest.mark.parametrize("state", list(State))
def test_every_call_in_every_state_leads_where_the_design_says_or_is_refused(
    world: World, state: State
) -> None:
    """State by call: the one right next state, or a refusal that changes nothing."""
    for verb, leads in LEADS.items():
        bring(world, state, verb)
        world.clock.advance(40 * DAY)
        before = read(world, verb)
        if state in leads:
            call(world, verb, verb)
            assert read(world, verb).state is leads[state], verb
        else:
            with pytest.raises((errors.Conflict, errors.Gone, errors.Forbidden)):
                call(world, verb, verb)
            assert read(world, verb) == before, verb


def test_activation_drains_the_previous_version_for_the_grace(world: World) -> None:
    """One transaction: the new version ACTIVE, the old one DRAINING until now plus grace."""
    bring(world, S.ACTIVE)
    call(world, "replace")
    old, new = read(world), read(world, version=2)
    assert (old.state, new.state) == (S.DRAINING, S.ACTIVE)
    assert old.drain_until == world.clock.now + timedelta(seconds=world.policy.grace_s)
    assert new.activated_at == world.clock.now
    assert operation(world, version=2).status is OperationStatus.SUCCEEDED


def audited(world: World, action: str) -> list[Audit]:
    with world.service.database.read(PLATFORM) as session:
        return list(session.exec(select(Audit).where(Audit.action == action)))


def test_a_new_address_is_told_at_once_and_audited_once(world: World) -> None:
    """The same again is no change; whoever read the version before is told that it has changed since."""
    bring(world, S.ACTIVE)
    before = read(world)
    assert call(world, "readdress").endpoint == "https://new"
    after = call(world, "readdress")
    assert after == read(world)
    assert after == before.model_copy(
        update={
            "endpoint": "https://new",
            "row_version": before.row_version + 1,
            "updated_at": world.clock.now,
        }
    )
    [row] = audited(world, "readdress")
    assert (row.subject, row.detail) == ("chat/keys/1", {"endpoint": "https://new", "former": "http://e"})
    stale = Address(endpoint="https://newer")
    with pytest.raises(errors.PreconditionFailed):
        world.do(lifecycle.readdress, *AT, 1, before.row_version, stale)


def test_a_failed_materialisation_leaves_the_active_version_alone(world: World) -> None:
    """The old version stays ACTIVE, the operation tells why, and a new rotation may begin."""
    bring(world, S.ACTIVE)
    call(world, "rotate")
    call(world, "materialize", version=2)
    call(world, "fail", version=2)
    assert read(world).state is S.ACTIVE
    assert read(world, version=2).failure == "broken"
    failed = operation(world, version=2)
    assert (failed.status, failed.error) == (OperationStatus.FAILED, "broken")
    assert call(world, "rotate") == 3


@pytest.mark.parametrize("state", [S.PENDING, S.MATERIALIZING, S.STAGED])
def test_a_second_rotation_in_flight_is_refused_with_the_first_ones_name(world: World, state: State) -> None:
    """409 names the operation to wait for or cancel; cancelled, it gives way."""
    bring(world, state)
    with pytest.raises(errors.Conflict, match=operation(world).id) as refused:
        call(world, "rotate")
    assert refused.value.code == "rotation_in_flight"
    call(world, "cancel")
    assert operation(world).status is OperationStatus.CANCELLED
    assert call(world, "rotate") == 2


def test_retirement_waits_for_the_grace_and_says_how_long(world: World) -> None:
    """Before ``drain_until`` clients may still use the version."""
    bring(world, S.DRAINING)
    world.clock.advance(world.policy.grace_s - 1)
    with pytest.raises(errors.Conflict) as refused:
        call(world, "retire")
    assert (refused.value.code, refused.value.retry_after) == ("too_early", 1)
    world.clock.advance(1)
    assert call(world, "retire").state is S.RETIRED


def test_resume_is_refused_while_another_version_is_active(world: World) -> None:
    """A suspended version does not come back beside its successor."""
    bring(world, S.SUSPENDED)
    call(world, "replace")
    with pytest.raises(errors.Conflict) as refused:
        call(world, "resume")
    assert refused.value.code == "another_active"


def test_a_suspended_draining_version_resumes_draining(world: World) -> None:
    """SUSPENDED remembers where it came from, deadline included."""
    bring(world, S.DRAINING)
    until = read(world).drain_until
    call(world, "suspend")
    resumed = call(world, "resume")
    assert (resumed.state, resumed.drain_until) == (S.DRAINING, until)


@pytest.mark.parametrize("origin", [S.COMPROMISED, S.FAILED])
def test_only_what_was_retired_is_restored(world: World, origin: State) -> None:
    """What was compromised or never worked does not come back, not even as RETIRED."""
    bring(world, origin)
    call(world, "destroy")
    with pytest.raises(errors.Conflict) as refused:
        call(world, "restore")
    assert refused.value.code == "not_restorable"


def test_a_shortened_delay_does_not_bring_destruction_forward(world: World) -> None:
    """Restore and destroy again: the first deadline still stands, for deadlines only move forward."""
    bring(world, S.DESTROY_SCHEDULED)
    first = read(world).destroy_at
    call(world, "restore")
    assert read(world).destroy_at is None
    world.do(tenants.update_policy, *AT, RotationPolicyPatch(destroy_delay_s=0))
    assert call(world, "destroy").destroy_at == first


def test_destruction_waits_for_its_time_and_erases_the_root(world: World) -> None:
    """Refused before ``destroy_at``; afterwards no ciphertext is left, and the number stays taken."""
    bring(world, S.DESTROY_SCHEDULED)
    with pytest.raises(errors.Conflict, match="left"):
        call(world, "destroyed")
    world.clock.advance(world.policy.destroy_delay_s)
    call(world, "destroyed")
    assert world.sql("SELECT ciphertext FROM key_version WHERE version = 1") == [(None,)]
    assert call(world, "rotate") == 3


def test_a_version_record_tells_what_verifies_without_the_root(world: World) -> None:
    """Key id, check values and public key of the record are those of the released root."""
    bring(world, S.MATERIALIZING)
    record, holder = read(world), world.holder(world.grant(1))
    root = world.release_to_job(holder, *AT, 1).material()
    key = TenantKey.from_root(root, *AT, 1)
    assert (record.key_id, record.kcv, record.vocab_kcv) == (key.id, key.kcv, key.vocab_kcv)
    assert base64.b64decode(record.public_key or "") == key.public_key()


UPDATE = "UPDATE key_version SET row_version = row_version + 1, "
COPIED = "tenant, state, created_at, updated_at, row_version, served_tokens"
COPY = (
    f"INSERT INTO key_version ({COPIED}, model, version)"
    f" SELECT tenant, 'PENDING', created_at, updated_at, 1, 0, {{model}}, {{version}}"
    " FROM key_version WHERE model = 'chat' AND version = 2"
)
OPERATION = "kind, tenant, model, version, status, phase, progress, created_at, updated_at, attempts"
COPY_OPERATION = (
    f"INSERT INTO operation (id, {OPERATION}) SELECT 'op', {OPERATION}"
    " FROM operation WHERE model = 'chat' AND version = 2"
)
COPY_WITH = (
    "INSERT INTO key_version"
    " (tenant, model, version, created_at, updated_at, row_version, served_tokens, {0})"
    " SELECT tenant, model, 9, created_at, updated_at, 1, 0, {1}"
    " FROM key_version WHERE model = 'other' AND version = 1"
)
# chat: 1 ACTIVE, 2 STAGED; other: 1 DRAINING, 2 ACTIVE; draft: 1 PENDING; lost: 1 FAILED.
# What is tried, and the words of the refusal, SQLite's and PostgreSQL's where they differ.
REFUSED_BY_THE_DATABASE = {
    "two active": (
        UPDATE + "endpoint = 'e', state = 'ACTIVE' WHERE model = 'chat' AND version = 2",
        "UNIQUE constraint failed: key_version.tenant, key_version.model$|uq_key_version_active",
    ),
    "two in flight": (
        COPY.format(model="'chat'", version=9),
        "UNIQUE constraint failed: key_version.tenant, key_version.model$|uq_key_version_in_flight",
    ),
    "an old number": (COPY.format(model="'other'", version=1), "version numbers only grow"),
    "a smaller last number": ("UPDATE model SET last_version = 0", "version numbers only grow"),
    "no such transition": (UPDATE + "state = 'PENDING' WHERE version = 2", "no such transition"),
    "no such state": (UPDATE + "previous_state = 'LOST'", "ck_key_version_previous_state"),
    "an uncounted change": ("UPDATE key_version SET served_tokens = 1", "row_version counts every change"),
    "another identity": (UPDATE + "kcv = '0'", "keeps its identity"),
    "a deleted version": ("DELETE FROM key_version", "never deleted"),
    "an earlier deadline": (UPDATE + "drain_until = '2000-01-01'", "deadlines only move forward"),
    "a drain without end": (
        UPDATE + "state = 'DRAINING' WHERE model = 'chat' AND version = 1",
        "ck_key_version_drain_until",
    ),
    "a suspension from nowhere": (
        UPDATE + "state = 'SUSPENDED' WHERE model = 'chat' AND version = 1",
        "ck_key_version_origin",
    ),
    "an unknown tenant": (
        "UPDATE model SET tenant = 'nobody'",
        "FOREIGN KEY constraint failed|fk_key_version_model",
    ),
    "half a key": (COPY_WITH.format("state, key_id", "'PENDING', 'k'"), "ck_key_version_whole"),
    "a ciphertext of no KEK": (UPDATE + "kek_version = NULL", "ck_key_version_whole"),
    "a version that never was prepared": (
        UPDATE + "state = 'MATERIALIZING' WHERE model = 'draft'",
        "ck_key_version_prepared",
    ),
    "a key given late": (
        UPDATE + "key_id = 'k', kcv = 'c', vocab_kcv = 'v', public_key = 'p' WHERE model = 'lost'",
        "keeps its identity",
    ),
    "a root erased early": (UPDATE + "ciphertext = NULL, kek_version = NULL", "only when destroyed"),
    "a version elsewhere": (UPDATE + "created_at = '2000-01-01'", "stays where it is"),
    "a version that begins elsewhere": (COPY_WITH.format("state", "'ACTIVE'"), "begins in PENDING"),
    "half a lease": ("UPDATE operation SET leased_by = 'me'", "ck_operation_lease"),
    "a rotation of nothing": ("UPDATE operation SET model = NULL", "ck_operation_subject"),
    "a second rotation of a version": (
        COPY_OPERATION,
        "UNIQUE constraint failed: operation.tenant, .*version$|uq_operation_rotation",
    ),
    "two grants of a version": (
        "UPDATE release_grant SET voided_at = NULL, version = 2 WHERE model = 'chat'",
        "UNIQUE constraint failed: release_grant|uq_release_grant_current",
    ),
    "a part beyond the last": ("UPDATE release_grant SET part = 3, parts = 2", "ck_release_grant_part"),
    "more than all of a part": ("UPDATE release_grant SET done = 1.5", "ck_release_grant_done"),
    "a signing key that is kept for ever": (
        "UPDATE signing_key SET retired_at = created_at",
        "ck_signing_key_erased",
    ),
    "an edited audit row": ("UPDATE audit SET actor = 'nobody'", "only ever added to"),
    "a deleted audit row": ("DELETE FROM audit", "only ever added to"),
    "a platform key of a tenant": (
        "INSERT INTO api_key VALUES ('k', 'acme', 'n', 'platform', 'h', '2030-01-01', NULL)",
        "ck_api_key_platform",
    ),
}


@pytest.mark.parametrize("breach", REFUSED_BY_THE_DATABASE)
def test_the_database_itself_refuses_what_breaks_an_invariant(world: World, breach: str) -> None:
    """Whatever code writes to it: constraint, partial index or trigger stands in the way."""
    statement, words = REFUSED_BY_THE_DATABASE[breach]
    bring(world, S.DRAINING, "other")
    bring(world, S.ACTIVE)
    call(world, "staged")
    world.model("acme", "draft")
    world.do(rotation.rotate, "acme", "draft")
    world.model("acme", "lost")
    world.do(rotation.cancel, "acme", world.do(rotation.rotate, "acme", "lost").id)
    with pytest.raises(IntegrityError) as refused:
        world.sql(statement)
    assert re.search(words, str(refused.value.orig))


def test_compare_and_set_refuses_a_row_that_changed_meanwhile(world: World) -> None:
    """A transition from a row that was changed since it was read is a conflict."""
    bring(world, S.ACTIVE)
    with pytest.raises(errors.Conflict, match="meanwhile"):
        world.do(suspend_a_stale_row)


def suspend_a_stale_row(work: Work) -> None:
    row = work.session.exec(select(KeyVersion)).one()
    work.session.connection().exec_driver_sql("UPDATE key_version SET row_version = row_version + 1")
    move(work, row, S.SUSPENDED, "suspend", previous_state=S.ACTIVE)
