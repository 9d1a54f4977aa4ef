"""The same world as in ``test_plan_properties``, as it is on Kubernetes: each part of it fails by itself.

Jobs outlive the operator, are seen until their pods are gone, and vanish some time after they have ended.
What is seen of them is older than what is seen of versions. Every action of a turn may fail while the next
one is done, or may be done while its answer is lost.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from tests.operator.test_plan_properties import REACHED, World, artifact

from anamorph.wire.states import State
from anamorph_operator import actions as act
from anamorph_operator.begin import Limits
from anamorph_operator.plan import plan
from anamorph_operator.state import Application, AppStatus, Check, Job, Ref

ENDS = st.sampled_from(["well", "crash"])
IN_USE = (State.ACTIVE, State.DRAINING, State.SUSPENDED)


class Cluster(World):
    """With several jobs at a time, so that one job at a time is no accident of the limit."""

    limits = Limits(parallel_jobs=3)

    def __init__(self) -> None:
        self.jobs: dict[Ref, Job] = {}
        self.stopping: set[Ref] = set()
        self.using: set[Ref] = set()  # grants that a pod works under
        super().__init__()

    # -- jobs -----------------------------------------------------------------

    @rule()
    def restart_operator(self) -> None:
        """Or another replica takes over: it finds the jobs that there are."""
        self.checks: dict[Ref, Check] = {}
        self.deleted: set[Ref] = set()

    @rule(how=ENDS)
    def job_ends(self, how: str) -> None:
        for ref in self.stopping:
            del self.jobs[ref]
        self.stopping.clear()
        super().job_ends(how)
        self.using.clear()

    @rule()
    def job_stages(self) -> None:
        """It has published and said so, and still tidies up."""
        for ref in self.using - self.stopping:
            if self.versions[ref.version].state is State.MATERIALIZING:
                self.move(ref.version, State.STAGED, artifact=artifact(ref.version))

    @rule()
    def ended_jobs_vanish(self) -> None:
        self.jobs = {ref: job for ref, job in self.jobs.items() if job.running}

    # -- ways into what is deep -------------------------------------------------

    @precondition(lambda self: len(self.versions) < 6)
    @rule()
    def a_rotation_goes_well(self) -> None:
        self.ray_up = True
        self.rotate()
        self.things_go_well(6)

    @precondition(lambda self: self.in_state(State.DRAINING))
    @rule(status=st.sampled_from([AppStatus.UNHEALTHY, AppStatus.DEPLOYING]))
    def the_successor_stops_answering(self, status: AppStatus) -> None:
        """Past every deadline of what drains: then that is the only version that answers."""
        for app in filter(None, map(self.app_of, self.in_state(State.ACTIVE))):
            self.apps[app.name] = replace(app, status=status)
        self.now += timedelta(seconds=40)
        self.in_flight.clear()  # no request lasts as long

    @precondition(lambda self: self.in_state(*IN_USE))
    @rule()
    def destroyed_while_ray_is_away(self) -> None:
        """The key service goes on, and the application stands."""
        self.ray_up = False
        number = self.in_state(*IN_USE)[0]
        self.move(number, State.COMPROMISED)
        self.move(number, State.DESTROY_SCHEDULED, destroy_at=self.now)

    # -- turns ----------------------------------------------------------------

    @rule(data=st.data(), meanwhile=st.sampled_from(["nothing", "stages", "well", "crash"]))
    def faulty_turn(self, data: st.DataObject, meanwhile: str) -> None:
        """Jobs are looked at first; then something happens; then everything else is looked at."""
        seen = dict(self.jobs)
        if meanwhile == "stages":
            self.job_stages()
        elif meanwhile != "nothing":
            self.job_ends(meanwhile)
        decided = plan(self.desired(), replace(self.observed(), jobs=seen), self.now, self.limits)
        for action in decided:
            outcome = data.draw(st.sampled_from(["done", "done", "failed", "lost"]))
            if outcome != "failed":
                self.do(action)
            if outcome == "lost" and isinstance(action, act.DeleteReplica):
                self.deleted.discard(action.ref)

    def do(self, action: act.Action) -> None:
        match action:
            case act.StartJob(ref):
                assert ref not in self.using, "released while a pod works under a former grant"
                assert self.versions[ref.version].artifact is None, "released though it is published"
                super().do(action)
                self.using.add(ref)
            case act.StopJob(ref):
                # Its pod may go on for a while; a job that has ended meanwhile is deleted.
                self.stopping |= {ref} & self.jobs.keys()
            case _:
                super().do(action)

    def apply(self, applications: tuple[Application, ...]) -> None:
        before = self.answered()
        super().apply(applications)
        assert before == self.answered(), "what serves was taken away"

    def answered(self) -> set[int]:
        """Versions in use whose application answers."""
        running = {n: app for n in self.in_state(*IN_USE) if (app := self.app_of(n)) is not None}
        return {number for number, app in running.items() if app.status is REACHED}


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
