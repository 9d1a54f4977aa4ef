"""The state machine of key versions against an independent model of it, under random calls."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlmodel import col, select

from anamorph import errors
from anamorph.wire.admin import Activation, Failure, GrantCreate, RotationPolicyPatch, UsageReport
from anamorph.wire.audit import first_break
from anamorph.wire.states import State
from anamorph_keysvc import audit
from anamorph_keysvc.homes import Home
from anamorph_keysvc.scope import PLATFORM
from anamorph_keysvc.service import lifecycle, materialization, preparation, rotation, tenants, usage
from anamorph_keysvc.tables import Audit, KeyVersion, Operation

if TYPE_CHECKING:
    from tests.keysvc.conftest import World

S = State
AT = ("acme", "chat")
GRACE = 60
MOSTLY, CHOICE = 6, st.integers(0, 7)
PARTS = 2
# State → states that each verb may be called in. Written from the design, not from the code.
ADMITTED: dict[str, set[State]] = {
    "suspend": {S.ACTIVE, S.DRAINING},
    "revoke": {S.PENDING, S.MATERIALIZING, S.STAGED, S.ACTIVE, S.DRAINING, S.SUSPENDED, S.RETIRED},
    "activate": {S.STAGED},
    "destroy": {S.RETIRED, S.COMPROMISED, S.FAILED},
}

CALLS = (
    "rotate",
    "materialize",
    "begin_in_parts",
    *["take_a_part"] * 2,
    *["work_on_a_part"] * 2,
    "work_under_the_grant",
    *["carry_on"] * 2,
    *["carry_on_for_long"] * 4,
    "fail_as_platform",
    "cancel",
    "activate",
    "suspend",
    "resume",
    "revoke",
    *["retire"] * 3,
    "destroy",
    *["restore"] * 2,
    "destroyed",
    "release_to_client",
    "report",
    *["time_passes"] * 3,
    "change_delay",
)


@dataclass
class Known:
    """What the model knows of one version."""

    state: State = S.PENDING
    back_to: State | None = None
    drain_until: datetime | None = None
    destroy_at: datetime | None = None
    was_compromised: bool = False
    transitions: int = 1
    tokens: dict[str, int] = field(default_factory=dict)
    grant: str | None = None
    grant_used: bool = False
    parts: int = 0
    parts_grants: dict[int, tuple[str, bool]] = field(default_factory=dict)
    void: list[tuple[str, int]] = field(default_factory=list)

    def goes(self, state: State) -> None:
        self.state = state
        self.transitions += 1
        self.was_compromised |= state is S.COMPROMISED


class KeyLife(RuleBasedStateMachine):
    """Calls in any order; the service must agree with the model on every answer."""

    opened: Callable[[Home], World]
    template: Home
    calls: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        home = Home(Path(shutil.copytree(self.template.path, Path(self.folder.name) / "home")))
        self.world = self.opened(home)
        self.known: dict[int, Known] = {}
        self.delay = 100

    def teardown(self) -> None:
        self.the_chain_is_unbroken()
        self.world.service.database.close()
        self.folder.cleanup()

    @initialize()
    def register(self) -> None:
        self.world.model()

    # How calls are made and compared.

    def pick(self, choice: int, *states: State) -> int | None:
        """One of the known versions; mostly, if there is one, one in a state that admits the call."""
        fitting = [version for version, known in self.known.items() if known.state in states]
        among = sorted(fitting if fitting and choice < MOSTLY else self.known)
        return among[-1 - choice % len(among)] if among else None

    def expect(self, allowed: bool, act: Callable[..., Any], *args: Any) -> Any:
        """Do a piece of work, and insist on a refusal exactly when the model refuses."""
        return self.expect_call(allowed, lambda: self.world.do(act, *args), act.__name__)

    def expect_call(self, allowed: bool, call: Callable[[], Any], name: str) -> Any:
        try:
            answer = call()
        except (errors.Conflict, errors.Gone, errors.Forbidden):
            assert not allowed, f"{name} was refused"
            return None
        assert allowed, f"{name} was admitted"
        return answer

    @property
    def now(self) -> datetime:
        return self.world.clock.now

    def having(self, *states: State) -> list[Known]:
        return [known for known in self.known.values() if known.state in states]

    # The calls. One rule draws them: rules of their own would be drawn too unevenly to get far.

    @rule(call=st.sampled_from(CALLS), choice=CHOICE)
    def call(self, call: str, choice: int) -> None:
        self.calls[call] += 1
        getattr(self, call)(choice)

    def rotate(self, _choice: int = 0) -> None:
        free = not self.having(S.PENDING, S.MATERIALIZING, S.STAGED)
        answer = self.expect(free, rotation.rotate, *AT)
        if answer is not None:
            preparation.prepare(self.world.service, answer.id)
            assert answer.version == len(self.known) + 1
            self.known[answer.version] = Known()

    def materialize(self, choice: int, parts: int = 0) -> None:
        version = self.pick(choice, S.PENDING, S.MATERIALIZING)
        if version is None:
            return
        known = self.known[version]
        allowed = known.state in {S.PENDING, S.MATERIALIZING}
        wanted = GrantCreate(parts=parts or None)
        answer = self.expect(allowed, materialization.materialize, *AT, version, None, wanted)
        if answer is not None:
            if known.state is S.PENDING:
                known.goes(S.MATERIALIZING)
            known.void += [(secret, part) for part, (secret, _) in known.parts_grants.items()]
            known.grant, known.grant_used, known.parts, known.parts_grants = answer.secret, False, parts, {}

    def begin_in_parts(self, choice: int) -> None:
        self.materialize(choice, PARTS)

    def take_a_part(self, choice: int) -> None:
        version = self.pick(choice, S.MATERIALIZING)
        if version is None:
            return
        known, part = self.known[version], choice % PARTS
        allowed = known.state is S.MATERIALIZING and known.parts == PARTS
        wanted = GrantCreate(parts=PARTS, part=part)
        answer = self.expect(allowed, materialization.materialize, *AT, version, None, wanted)
        if answer is not None:
            if part in known.parts_grants:
                known.void.append((known.parts_grants[part][0], part))
            known.parts_grants[part] = answer.secret, False

    def work_on_a_part(self, choice: int) -> None:
        """Release to a part; one that was started again, and one whose grant is void, get nothing."""
        version = self.pick(choice, S.MATERIALIZING)
        if version is None:
            return
        known = self.known[version]
        for part, (secret, used) in known.parts_grants.items():
            good = known.state is S.MATERIALIZING and not used
            if self.release_to(version, secret, part, good) is not None:
                known.parts_grants[part] = secret, True
        for secret, part in known.void[-PARTS:]:
            self.release_to(version, secret, part, False)

    def release_to(self, version: int, secret: str, part: int | None, allowed: bool) -> Any:
        holder = self.world.holder(secret)
        return self.expect_call(
            allowed, lambda: self.world.release_to_job(holder, *AT, version, part), "release to a job"
        )

    def work_under_the_grant(self, choice: int, step: str | None = None) -> None:
        step = step or ("release", "stage", "fail")[choice % 3]
        version = self.pick(choice, S.MATERIALIZING)
        if version is None or self.known[version].grant is None:
            return
        known, holder = self.known[version], self.world.holder(self.known[version].grant or "")
        running = known.state is S.MATERIALIZING
        if step == "release":
            allowed = running and not known.grant_used
            known.grant_used |= self.release_to(version, known.grant or "", None, allowed) is not None
        elif step == "stage":
            again = known.state not in {S.PENDING, S.MATERIALIZING} and self.staged_once(version)
            allowed = again or (running and known.grant_used)
            answer = self.expect(allowed, materialization.stage, holder, *AT, version, self.world.artifact)
            if answer is not None and not again:
                known.goes(S.STAGED)
        else:
            self.fails(version, holder, running or known.state is S.FAILED)

    def staged_once(self, version: int) -> bool:
        with self.world.service.database.read(PLATFORM) as session:
            row = session.get(KeyVersion, (*AT, version))
            return row is not None and row.artifact is not None

    def fails(self, version: int, holder: Any, allowed: bool) -> None:
        known = self.known[version]
        answer = self.expect(allowed, materialization.fail, holder, *AT, version, Failure(reason="r"))
        if answer is not None and known.state is not S.FAILED:
            known.goes(S.FAILED)

    def carry_on(self, _choice: int = 0) -> None:
        """The next step of a rotation, whichever it is: random calls alone seldom get far."""
        newest = self.known[max(self.known)] if self.known else None
        if newest is None or newest.state not in {S.PENDING, S.MATERIALIZING, S.STAGED}:
            self.rotate()
        elif newest.state is S.PENDING:
            self.materialize(0)
        elif newest.state is S.MATERIALIZING:
            self.work_under_the_grant(0, "stage" if newest.grant_used else "release")
        else:
            self.activate(0)

    def carry_on_for_long(self, choice: int) -> None:
        for _ in range(choice):
            self.carry_on()

    def fail_as_platform(self, choice: int) -> None:
        version = self.pick(choice, S.STAGED)
        if version is not None:
            allowed = self.known[version].state in {S.PENDING, S.MATERIALIZING, S.STAGED, S.FAILED}
            self.fails(version, None, allowed)

    def cancel(self, choice: int) -> None:
        version = self.pick(choice, S.PENDING, S.MATERIALIZING, S.STAGED)
        if version is None:
            return
        with self.world.service.database.read(PLATFORM) as session:
            operation = session.exec(select(Operation).where(Operation.version == version)).one()
        allowed = self.known[version].state in {S.PENDING, S.MATERIALIZING, S.STAGED}
        again = operation.status.value == "cancelled"
        if self.expect(allowed or again, rotation.cancel, "acme", operation.id) and not again:
            self.known[version].goes(S.FAILED)

    def activate(self, choice: int) -> None:
        version = self.pick(choice, S.STAGED)
        if version is None:
            return
        known, previous = self.known[version], self.having(S.ACTIVE)
        body = Activation(endpoint="http://e")
        if self.expect(known.state is S.STAGED, lifecycle.activate, *AT, version, None, body):
            for old in previous:
                old.goes(S.DRAINING)
                old.drain_until = max(old.drain_until or self.now, self.now + timedelta(seconds=GRACE))
            known.goes(S.ACTIVE)

    def suspend(self, choice: int) -> None:
        version = self.pick(choice, S.ACTIVE, S.DRAINING)
        if version is None:
            return
        known = self.known[version]
        if self.expect(known.state in ADMITTED["suspend"], lifecycle.suspend, *AT, version, None):
            known.back_to = known.state
            known.goes(S.SUSPENDED)

    def resume(self, choice: int) -> None:
        version = self.pick(choice, S.SUSPENDED)
        if version is None:
            return
        known = self.known[version]
        taken = known.back_to is S.ACTIVE and bool(self.having(S.ACTIVE))
        if self.expect(known.state is S.SUSPENDED and not taken, lifecycle.resume, *AT, version, None):
            assert known.back_to is not None
            known.goes(known.back_to)

    def revoke(self, choice: int) -> None:
        version = self.pick(choice, *ADMITTED["revoke"])
        if version is None or choice % 3:  # seldom, or nothing lives long enough to be interesting
            return
        known = self.known[version]
        if self.expect(known.state in ADMITTED["revoke"], lifecycle.revoke, *AT, version, None):
            known.goes(S.COMPROMISED)

    def retire(self, choice: int) -> None:
        version = self.pick(choice, S.DRAINING)
        if version is None:
            return
        known = self.known[version]
        allowed = (
            known.state is S.DRAINING and known.drain_until is not None and self.now >= known.drain_until
        )
        if self.expect(allowed, lifecycle.retire, *AT, version, None):
            known.goes(S.RETIRED)

    def destroy(self, choice: int) -> None:
        version = self.pick(choice, S.RETIRED, S.COMPROMISED, S.FAILED)
        if version is None:
            return
        known = self.known[version]
        origin = known.state
        if self.expect(origin in ADMITTED["destroy"], lifecycle.destroy, *AT, version, None):
            known.back_to = origin
            known.destroy_at = max(known.destroy_at or self.now, self.now + timedelta(seconds=self.delay))
            known.goes(S.DESTROY_SCHEDULED)

    def restore(self, choice: int) -> None:
        version = self.pick(choice, S.DESTROY_SCHEDULED)
        if version is None:
            return
        known = self.known[version]
        allowed = known.state is S.DESTROY_SCHEDULED and known.back_to is S.RETIRED
        assert not (allowed and known.was_compromised)
        if self.expect(allowed, lifecycle.restore, *AT, version, None):
            known.goes(S.RETIRED)

    def destroyed(self, choice: int) -> None:
        version = self.pick(choice, S.DESTROY_SCHEDULED)
        if version is None:
            return
        known = self.known[version]
        due = known.destroy_at is not None and self.now >= known.destroy_at
        if self.expect(known.state is S.DESTROY_SCHEDULED and due, lifecycle.destroyed, *AT, version, None):
            known.goes(S.DESTROYED)

    def release_to_client(self, choice: int) -> None:
        version = self.pick(choice, S.STAGED, S.ACTIVE, S.DRAINING)
        if version is not None:
            allowed = self.known[version].state in {S.STAGED, S.ACTIVE, S.DRAINING}
            self.expect_call(
                allowed, lambda: self.world.release_to_client(*AT, version), "release to a client"
            )

    def report(self, choice: int) -> None:
        version, source, tokens = self.pick(choice), "ab"[choice % 2], choice * len(self.known)
        if version is None:
            return
        counts = self.known[version].tokens
        counts[source] = max(counts.get(source, 0), tokens)
        answer = self.expect(True, usage.report, *AT, version, UsageReport(source=source, tokens=tokens))
        assert answer.served_tokens == sum(counts.values())

    def time_passes(self, choice: int) -> None:
        self.world.clock.advance((1, 30, 70, 120)[choice % 4])

    def change_delay(self, choice: int) -> None:
        delay = (0, 100, 500)[choice % 3]
        self.world.do(tenants.update_policy, *AT, RotationPolicyPatch(destroy_delay_s=delay))
        self.delay = delay

    # What must hold after every call.

    @invariant()
    def the_service_agrees_with_the_model(self) -> None:
        with self.world.service.database.read(PLATFORM) as session:
            rows = session.exec(select(KeyVersion)).all()
        assert {row.version: row.state for row in rows} == {
            version: known.state for version, known in self.known.items()
        }
        for row in rows:
            known = self.known[row.version]
            assert (row.drain_until, row.destroy_at) == (known.drain_until, known.destroy_at)
            assert (row.ciphertext is None) == (known.state is S.DESTROYED)

    @invariant()
    def at_most_one_is_active(self) -> None:
        assert len(self.having(S.ACTIVE)) <= 1
        assert len(self.having(S.PENDING, S.MATERIALIZING, S.STAGED)) <= 1

    @invariant()
    def each_transition_has_one_row(self) -> None:
        with self.world.service.database.read(PLATFORM) as session:
            rows = session.exec(select(Audit.subject, Audit.detail)).all()
        written = Counter(subject for subject, detail in rows if "state" in detail)
        expected = {f"chat/keys/{version}": known.transitions for version, known in self.known.items()}
        assert written == expected

    def the_chain_is_unbroken(self) -> None:
        with self.world.service.database.read(PLATFORM) as session:
            rows = [audit.read(row) for row in session.exec(select(Audit).order_by(col(Audit.sequence)))]
        assert first_break(rows, tenant="acme") is None


def explore(template: Home, opened: Callable[[Home], World], examples: int) -> int:
    """Live through so many lives of sixty calls each; how many calls were made."""
    calls: Counter[str] = Counter()
    machine = type(
        "Machine", (KeyLife,), {"template": template, "opened": staticmethod(opened), "calls": calls}
    )
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
        ),
    )
    assert set(calls) == set(CALLS)
    return calls.total()


def test_any_sequence_of_calls_keeps_the_invariants(
    template: Home, open_homes: Callable[[Home], World]
) -> None:
    """Whatever is called in whatever order: same answers as the model, and every invariant holds."""
    explore(template, open_homes, 12)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_calls_keep_the_invariants(template: Home, open_homes: Callable[[Home], World]) -> None:
    """The same at length."""
    assert explore(template, open_homes, 200) >= 10_000
