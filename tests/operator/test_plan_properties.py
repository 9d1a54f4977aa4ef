"""The operator against a simulated world, in every order of events that Hypothesis can think of.

The simulated key service knows the state machine (``wire.states``) and refuses what it
does not admit; the simulated Ray knows what stands and what is in flight. Each rule
below is one thing that can happen; ``turn`` is one turn of the operator.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from anamorph.wire.admin import (
    Autoscaling,
    KeyVersionRead,
    Materialized,
    ModelRead,
    ModelSettings,
    Probe,
    RotationPolicy,
    Serving,
)
from anamorph.wire.serving import DoorState, KeyState, PoolState, Usage
from anamorph.wire.states import GONE, ONGOING, TRANSITIONS, State
from anamorph_operator import actions as act
from anamorph_operator.begin import EXIT_REFUSED, Limits
from anamorph_operator.listing import standing
from anamorph_operator.plan import plan
from anamorph_operator.state import (
    Application,
    AppStatus,
    Baseline,
    Check,
    Deployed,
    Desired,
    Job,
    Observed,
    Outcome,
    Ref,
)

T0 = datetime(2026, 1, 1, tzinfo=UTC)
POLICY = RotationPolicy(
    grace_s=20,
    client_cache_ttl_s=5,
    longest_request_s=10,
    clock_skew_s=0,
    propagation_s=5,
    destroy_delay_s=30,
)
MODEL = ModelRead(
    id="smol",
    tenant="acme",
    base="/bases/smol",
    engine="fake",
    vocab_size=100,
    context_length=64,
    policy=POLICY,
    created_at=T0,
)
DEDICATED = Serving()
ASLEEP = Serving(autoscaling=Autoscaling(min_replicas=0))
SHARED = Serving(placement="shared", pool="small")
WAITING = {State.PENDING, State.MATERIALIZING, State.STAGED}
REACHED = AppStatus.RUNNING


class World(RuleBasedStateMachine):
    """One model of one tenant, its key service, its Ray, its operator."""

    limits = Limits()

    def __init__(self) -> None:
        super().__init__()
        self.now = T0
        self.versions: dict[int, KeyVersionRead] = {}
        self.before_suspension: dict[int, State] = {}
        self.apps: dict[str, Deployed] = {}
        self.in_flight: dict[str, int] = {}  # by the version's own name, whatever serves it
        self.serving = DEDICATED
        self.ray_up = True
        self.context_length = 64
        self.public_url = "http://one"
        self.restart_operator()

    # -- what the plan sees -------------------------------------------------

    def model(self) -> ModelRead:
        fields = {
            "context_length": self.context_length,
            "serving": self.serving,
            "last_version": len(self.versions),
        }
        return MODEL.model_copy(update=fields)

    def app_of(self, number: int) -> Deployed | None:
        """What serves a version now: its application, or its pool once it is a member."""
        ref = Ref("acme", "smol", number)
        return Observed(deployed=self.apps).app(ref, self.issued_as(number))

    def issued_as(self, number: int) -> ModelRead:
        """The record as it was when a version was issued, whatever became of it."""
        return self.model().model_copy(update=dict(self.versions[number].settings or {}))

    def served_by(self, app: Deployed) -> list[int]:
        return [n for n in self.versions if self.app_of(n) is app]

    def listed(self) -> list[KeyVersionRead]:
        """What the driver reads: no version of the past, unless it is due or something of it stands."""
        there = standing(self.apps) if self.ray_up else set()
        return [
            version
            for version in self.versions.values()
            if version.state in ONGOING or due(version, self.now) or Ref.of(version) in there
        ]

    def desired(self) -> Desired:
        return Desired(
            tuple(self.listed()),
            (self.model(),),
            (),
            "http://serve",
            baselines=(Baseline("smol", "/bases/smol", 64),),
            allow_base=("/bases",),
            public_url=self.public_url,
        )

    def observed(self) -> Observed:
        running = [a for a in self.apps.values() if a.status is REACHED] if self.ray_up else []
        served = {Ref.of(self.versions[n]) for app in running for n in self.served_by(app)}
        return Observed(
            deployed=dict(self.apps) if self.ray_up else None,
            jobs=dict(self.jobs),
            checks=dict(self.checks),
            usage={r: Usage(source="p", tokens=0, in_flight=self.in_flight.get(r.app, 0)) for r in served},
            reported={r: Usage(source="p", tokens=0) for r in served},
            deleted=frozenset(self.deleted),
        )

    # -- the key service ----------------------------------------------------

    def move(self, number: int, to: State, **fields: object) -> None:
        version = self.versions[number]
        assert to in TRANSITIONS[version.state], f"{version.state} -> {to}"
        self.versions[number] = version.model_copy(update={"state": to, "updated_at": self.now, **fields})

    def in_state(self, *states: State) -> list[int]:
        return [number for number, version in self.versions.items() if version.state in states]

    @initialize(serving=st.sampled_from([DEDICATED, ASLEEP, SHARED, SHARED]))
    def first(self, serving: Serving) -> None:
        self.serving = serving
        self.rotate()

    @precondition(lambda self: len(self.versions) < 6)
    @rule()
    def rotate(self) -> None:
        number = len(self.versions) + 1
        self.versions[number] = KeyVersionRead(
            tenant="acme",
            model="smol",
            version=number,
            state=State.PENDING,
            key_id=f"acme.smol.v{number}.{number:016x}",
            kcv=f"{number:016x}",
            vocab_kcv=f"{number:016x}",
            public_key="AAAA",
            row_version=1,
            created_at=self.now,
            updated_at=self.now,
            settings=ModelSettings(**self.model().model_dump(include=set(ModelSettings.model_fields))),
        )

    @precondition(lambda self: self.in_state(State.ACTIVE))
    @rule()
    def suspend(self) -> None:
        [number] = self.in_state(State.ACTIVE)
        self.move(number, State.SUSPENDED)

    @precondition(lambda self: self.in_state(State.SUSPENDED) and not self.in_state(State.ACTIVE))
    @rule()
    def resume(self) -> None:
        self.move(self.in_state(State.SUSPENDED)[0], State.ACTIVE)

    @rule(data=st.data())
    def revoke_or_destroy(self, data: st.DataObject) -> None:
        ended = self.in_state(State.RETIRED, State.FAILED, State.COMPROMISED)
        living = self.in_state(State.STAGED, State.ACTIVE, State.DRAINING, State.SUSPENDED)
        number = data.draw(st.sampled_from([None, *ended, *living]))
        if number in ended:
            self.move(number, State.DESTROY_SCHEDULED, destroy_at=self.now + timedelta(seconds=30))
        elif number is not None:
            self.move(number, State.COMPROMISED)

    # -- what happens by itself ---------------------------------------------

    @rule(seconds=st.sampled_from([1, 5, 16, 40]))
    def time_passes(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    @rule(how=st.sampled_from(["well", "well", "crash", "refused"]))
    def job_ends(self, how: str) -> None:
        for ref, job in self.jobs.items():
            if job.running:
                code = {"well": 0, "crash": 1, "refused": EXIT_REFUSED}[how]
                self.jobs[ref] = replace(job, running=False, exit_code=code, ended_at=self.now)
                if how == "well" and self.versions[ref.version].state is State.MATERIALIZING:
                    self.move(ref.version, State.STAGED, artifact=artifact(ref.version))

    @rule(data=st.data(), status=st.sampled_from([REACHED, REACHED, *AppStatus]))
    def ray_reports(self, data: st.DataObject, status: AppStatus) -> None:
        name = data.draw(st.sampled_from([*self.apps, None]))
        if name is not None and status is not AppStatus.DELETING:
            if status is not REACHED:
                # Its process is gone, and with it what it was doing.
                for number in self.served_by(self.apps[name]):
                    self.in_flight.pop(f"acme.smol.v{number}", None)
            self.apps[name] = replace(self.apps[name], status=status)

    @rule(outcome=st.sampled_from([Outcome.EQUAL, *Outcome]))
    def probe_ends(self, outcome: Outcome) -> None:
        for ref, check in self.checks.items():
            if check.outcome is Outcome.RUNNING:
                self.checks[ref] = replace(check, outcome=outcome, at=self.now)

    def answering(self) -> list[str]:
        """Versions that take new requests."""
        running = {n: app for n in self.versions if (app := self.app_of(n)) and app.status is REACHED}
        return [f"acme.smol.v{n}" for n, app in running.items() if not refuses(app, n)]

    @rule(data=st.data())
    def request_begins(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([*self.answering(), None]))
        if name is not None:
            self.in_flight[name] = self.in_flight.get(name, 0) + 1

    @rule()
    def requests_end(self) -> None:
        self.in_flight.clear()

    @rule(up=st.booleans())
    def ray_is_reachable(self, up: bool) -> None:
        self.ray_up = up

    @rule(
        context_length=st.sampled_from([32, 64]),
        serving=st.sampled_from([None, None, DEDICATED, ASLEEP, SHARED]),
    )
    def model_record_changes(self, context_length: int, serving: Serving | None) -> None:
        self.context_length = context_length
        self.serving = serving or self.serving

    @rule(url=st.sampled_from(["http://one", "http://two/"]))
    def address_changes(self, url: str) -> None:
        self.public_url = url

    @rule()
    def ray_starts_afresh(self) -> None:
        self.apps.clear()
        self.in_flight.clear()

    @rule()
    def restart_operator(self) -> None:
        self.jobs: dict[Ref, Job] = {}
        self.checks: dict[Ref, Check] = {}
        self.deleted: set[Ref] = set()

    # -- the operator -------------------------------------------------------

    def decide(self) -> list[act.Action]:
        return plan(self.desired(), self.observed(), self.now, self.limits)

    @rule(done=st.integers(0, 8), late=st.booleans())
    def turn(self, done: int, late: bool = False) -> None:
        """One turn: it may be killed in between, and requests may come after it has looked."""
        decided = self.decide()
        for name in self.answering() if late else ():
            self.in_flight[name] = self.in_flight.get(name, 0) + 1
        for action in decided[:done]:
            self.do(action)

    @rule(turns=st.integers(1, 6))
    def things_go_well(self, turns: int) -> None:
        """Whole turns with every job, deployment and probe a success: the way into the deeper states."""
        for _ in range(turns):
            self.turn(99)
            self.job_ends("well")
            self.probe_ends(Outcome.EQUAL)
            self.apps = {n: replace(a, status=REACHED) for n, a in self.apps.items()}
            self.now += timedelta(seconds=1)

    def do(self, action: act.Action) -> None:  # noqa: C901 - one case per action
        match action:
            case act.Apply():
                self.apply(action.applications)
            case act.StartJob(ref):
                assert self.versions[ref.version].state in {State.PENDING, State.MATERIALIZING}
                if self.versions[ref.version].state is State.PENDING:
                    self.move(ref.version, State.MATERIALIZING)
                former = self.jobs.get(ref)
                self.jobs[ref] = Job(True, former.attempts + 1 if former else 1)
            case act.StopJob(ref):
                self.jobs[ref] = replace(self.jobs[ref], running=False, exit_code=-15, ended_at=self.now)
            case act.FailVersion(ref):
                self.move(ref.version, State.FAILED)
            case act.Verify(ref):
                former_check = self.checks.get(ref)
                attempts = former_check.attempts + 1 if former_check else 1
                self.checks[ref] = Check(Outcome.RUNNING, attempts, self.now)
            case act.Activate(ref, endpoint):
                self.activate(ref, endpoint)
            case act.Readdress(ref, endpoint):
                self.readdress(ref, endpoint)
            case act.Retire(ref):
                self.retire(ref)
            case act.DeleteReplica(ref):
                assert self.app_of(ref.version) is None, "files of a replica that is served"
                self.deleted.add(ref)
            case act.Destroyed(ref):
                version = self.versions[ref.version]
                assert ref in self.deleted or version.artifact is None
                assert version.destroy_at is not None
                assert self.now >= version.destroy_at
                self.move(ref.version, State.DESTROYED)
            case act.ReportUsage():
                raise AssertionError("all usage is reported already")

    def apply(self, applications: tuple[Application, ...]) -> None:
        assert self.ray_up
        assert applications[0].name == "door"
        wanted = {app.name: app for app in applications}
        assert len(wanted) == len(applications)
        for name in self.apps.keys() - wanted.keys():
            self.remove(self.apps[name], self.served_by(self.apps[name]))
            del self.apps[name]
        for name, app in wanted.items():
            standing = self.apps.get(name)
            if standing is None:
                self.apps[name] = Deployed(name, AppStatus.DEPLOYING, app, self.now)
            else:
                assert standing.application is not None
                assert standing.application.settings == app.settings, "replaced in place"
                assert standing.application.route == app.route, "moved in place"
                left = [n for n in self.served_by(standing) if self.leaves(n, app)]
                self.remove(standing, left)
                self.apps[name] = replace(standing, application=app, deployed_at=self.now)
        self.check_door(applications)

    def leaves(self, number: int, app: Application) -> bool:
        """Whether a pool is written without one of its members."""
        return isinstance(app.state, PoolState) and app.member(Ref("acme", "smol", number)) is None

    def remove(self, app: Deployed, versions: list[int]) -> None:
        """An application goes, or a pool's members do."""
        for number in versions:
            assert self.in_flight.get(f"acme.smol.v{number}", 0) == 0, "deleted under a running request"
            if app.status is not AppStatus.DEPLOY_FAILED:
                assert self.versions[number].state in GONE | {State.FAILED}, "deleted before its key ended"

    def check_door(self, applications: tuple[Application, ...]) -> None:
        """It forwards to whatever has no route and is there, and to nothing else."""
        door = applications[0].state
        assert isinstance(door, DoorState)
        for route in door.routes:
            app = self.app_of(route.version)
            forwarded = app is not None and app.application is not None and app.application.route is None
            assert (route.app is not None) == forwarded
            assert route.app is None or app is None or route.app == app.name
        routes = {route.version: route.status for route in door.routes}
        up_to = max((ended.up_to for ended in door.ended), default=0)
        for number, version in self.versions.items():
            gone = routes.get(number, "gone" if number <= up_to else "unknown") == "gone"
            assert gone == (version.state in GONE | {State.FAILED}), "410 for exactly what has ended"

    def readdress(self, ref: Ref, endpoint: str) -> None:
        version = self.versions[ref.version]
        assert version.state in {State.ACTIVE, State.DRAINING, State.SUSPENDED}
        assert version.endpoint != endpoint
        assert self.app_of(ref.version) is not None, "told where nothing stands"
        self.versions[ref.version] = version.model_copy(update={"endpoint": endpoint})

    def activate(self, ref: Ref, endpoint: str) -> None:
        app = self.app_of(ref.version)
        assert app is not None
        assert app.status is REACHED
        assert all(ref.version > number for number in self.in_state(State.ACTIVE))
        for number in self.in_state(State.ACTIVE):
            self.move(number, State.DRAINING, drain_until=self.now + timedelta(seconds=20))
        self.move(ref.version, State.ACTIVE, activated_at=self.now, endpoint=endpoint)

    def retire(self, ref: Ref) -> None:
        deadline = self.versions[ref.version].drain_until
        assert deadline is not None
        assert self.now >= deadline
        [active] = self.in_state(State.ACTIVE)
        app = self.app_of(active)
        assert app is not None
        assert app.status is REACHED, "the only one that answers"
        self.move(ref.version, State.RETIRED)

    # -- what always holds --------------------------------------------------

    @invariant()
    def at_most_one_active(self) -> None:
        assert len(self.in_state(State.ACTIVE)) <= 1

    @invariant()
    def no_more_jobs_than_allowed(self) -> None:
        assert sum(job.running for job in self.jobs.values()) <= self.limits.parallel_jobs

    def teardown(self) -> None:
        """Left alone with everything working, it converges and then has nothing more to do."""
        self.ray_up = True
        for _ in range(40):
            self.things_go_well(1)
            self.in_flight.clear()
            self.now += timedelta(seconds=16)
        assert self.decide() == []
        assert not self.in_state(*WAITING, State.DESTROY_SCHEDULED)
        served = self.in_state(State.ACTIVE, State.DRAINING, State.SUSPENDED)
        assert [n for n in self.versions if self.app_of(n)] == served
        for number in served:
            url = self.public_url.rstrip("/")
            assert self.versions[number].endpoint == f"{url}/acme/smol/v{number}"
        own = {Ref("acme", "smol", n).served_by(self.issued_as(n)) for n in served}
        assert self.apps.keys() == {"door", "plaintext.smol.v0"} | own
        if self.in_state(State.ACTIVE):
            assert not self.in_state(State.DRAINING)


def due(version: KeyVersionRead, now: datetime) -> bool:
    scheduled = version.state is State.DESTROY_SCHEDULED
    return scheduled and version.destroy_at is not None and version.destroy_at <= now


def refuses(app: Deployed, number: int) -> bool:
    """Whether the engine answers that this version is gone."""
    assert app.application is not None
    state = app.application.state
    entry = state if isinstance(state, KeyState) else app.application.member(Ref("acme", "smol", number))
    return entry is not None and entry.status == "gone"


def artifact(number: int) -> Materialized:
    probe = Probe(prompts=((1, 2),), expected=((3, 4),))
    return Materialized(replica=f"file:///store/v{number}", manifest_sha256=f"{number:064x}", probe=probe)


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
