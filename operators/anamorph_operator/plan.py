"""What to do next: a pure function of what is wanted, what is there and the time.

It is level-triggered: it never asks what happened, only how things stand. Doing
its answer and asking again leads to an empty answer; doing half of it, or dying in
the middle, leads to the same end by the next answers.

Order of a rotation: materialise → apply → verify → activate → drain → retire →
remove. The key service knows of each step before the compute zone loses anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from anamorph.wire.admin import KeyVersionRead, ModelRead
from anamorph.wire.states import State
from anamorph_operator import pools
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
    Verify,
)
from anamorph_operator.applications import applications
from anamorph_operator.begin import BASE_OUTSIDE, EXIT_REFUSED, Limits, allowed, start_jobs, stop_jobs
from anamorph_operator.state import AppStatus, Deployed, Desired, Observed, Outcome, Ref


def plan(desired: Desired, observed: Observed, now: datetime, limits: Limits = Limits()) -> list[Action]:
    """Return the actions that bring what is there nearer to what is wanted, in order."""
    actions = [*_apply(desired, observed, now)]
    for version in desired.versions:
        step = _STEPS.get(version.state)
        model = desired.model_of(Ref.of(version))
        if step is not None and model is not None:
            actions += step(_View(desired, observed, now, limits, version, model))
    actions += stop_jobs(desired, observed)
    actions += start_jobs(desired, observed, now, limits)
    actions += _report_usage(desired, observed)
    return actions


@dataclass(frozen=True)
class _View:
    """One version with everything that a decision about it may look at."""

    desired: Desired
    observed: Observed
    now: datetime
    limits: Limits
    version: KeyVersionRead
    model: ModelRead

    @property
    def ref(self) -> Ref:
        return Ref.of(self.version)

    @property
    def app(self) -> Deployed | None:
        """The application that serves it."""
        return self.observed.app(self.ref, self.model)

    @property
    def running(self) -> bool:
        return self.app is not None and self.app.status is AppStatus.RUNNING

    @property
    def endpoint(self) -> str:
        """Its URL as seen from here."""
        return self.desired.serve_url.rstrip("/") + self.ref.route

    @property
    def public_endpoint(self) -> str:
        """Its URL as clients see it."""
        return (self.desired.public_url or self.desired.serve_url).rstrip("/") + self.ref.route

    def siblings(self, state: State) -> list[KeyVersionRead]:
        """The model's other versions in one state."""
        mine = (self.version.tenant, self.version.model)
        others = (v for v in self.desired.versions if v is not self.version)
        return [v for v in others if (v.tenant, v.model) == mine and v.state is state]


def _apply(desired: Desired, observed: Observed, now: datetime) -> list[Action]:
    if observed.deployed is None:
        return []
    wanted = applications(desired, observed, now)
    standing = {
        name: app.application
        for name, app in observed.deployed.items()
        if app.status is not AppStatus.DELETING
    }
    return [] if {app.name: app for app in wanted} == standing else [Apply(wanted)]


def _materialising(view: _View) -> list[Action]:
    """Give up what is refused or has failed too often; ``begin`` does the rest."""
    if not allowed(view.model.base, view.desired.allow_base):
        return [FailVersion(view.ref, BASE_OUTSIDE)]
    job = view.observed.jobs.get(view.ref)
    if job is None or job.running:
        return []
    if job.exit_code == EXIT_REFUSED:
        return [FailVersion(view.ref, "materialisation was refused; the operator's log says why")]
    if job.attempts >= view.limits.job_attempts:
        return [FailVersion(view.ref, f"materialisation failed {job.attempts} times")]
    return []


_REFUSED = "the serving side refused the replica; its log says why"


def _staged(view: _View) -> list[Action]:
    if any(active.version > view.version.version for active in view.siblings(State.ACTIVE)):
        return [FailVersion(view.ref, "superseded: a newer version is active")]
    refusal = _refusal(view)
    if refusal is not None:
        return [FailVersion(view.ref, refusal)]
    return _verified(view) if view.running else []


def _refusal(view: _View) -> str | None:
    """Why the serving side does not take a staged version, if it does not."""
    pool = view.model.serving.pool
    if view.app is None:
        standing = None if pool is None else pools.standing(pool, view.observed)
        return None if standing is None else pools.refusal(view.model, standing)
    if view.app.status is not AppStatus.DEPLOY_FAILED:
        return None
    if pool is not None and pools.in_use(view.desired, pool):
        return None  # it is deployed anew for the others
    return _REFUSED


def _verified(view: _View) -> list[Action]:
    check, artifact = view.observed.checks.get(view.ref), view.version.artifact
    if check is not None and check.outcome is Outcome.EQUAL:
        return [Activate(view.ref, view.public_endpoint)]
    if check is not None and check.outcome is Outcome.DIFFERENT:
        return [FailVersion(view.ref, "the served replica does not answer what materialisation computed")]
    if check is not None and check.outcome is Outcome.REFUSED:
        return [FailVersion(view.ref, _REFUSED)]
    if check is not None and check.outcome is Outcome.RUNNING:
        return []
    if check is not None and check.attempts >= view.limits.check_attempts:
        return [FailVersion(view.ref, f"the served replica did not answer {check.attempts} probes")]
    if artifact is None or (check is not None and view.now < check.at + view.limits.wait(check.attempts)):
        return []
    return [Verify(view.ref, view.endpoint, view.version.require_key_id(), artifact.probe)]


def _readdressed(view: _View) -> list[Action]:
    """Tell clients a new address of what is served; nothing of what is not, which may lie anywhere."""
    said = view.version.endpoint
    if said is None or not view.running or said.rstrip("/") == view.public_endpoint:
        return []
    return [Readdress(view.ref, view.public_endpoint)]


def _draining(view: _View) -> list[Action]:
    """Retire after the deadline, once its successor answers and nothing is in flight.

    A caller that keeps using the old key may hold it up for one longest request
    more; after that it is retired regardless and its calls are answered 410.
    """
    active = [Ref.of(version) for version in view.siblings(State.ACTIVE)]
    if not any(view.observed.running(ref, view.desired.model_of(ref)) for ref in active):
        return []  # it may be the only one that answers
    deadline = view.version.drain_until
    if deadline is None or view.now < deadline:
        return []
    overdue = view.now >= deadline + timedelta(seconds=view.model.policy.longest_request_s)
    return [Retire(view.ref)] if _idle(view) or overdue else []


def _idle(view: _View) -> bool:
    usage = view.observed.usage.get(view.ref)
    if view.app is None or view.app.status is AppStatus.DEPLOY_FAILED:
        return True
    return view.running and usage is not None and usage.in_flight == 0


def _destroying(view: _View) -> list[Action]:
    """First the application, then the files, then the word that erases the key."""
    due = view.version.destroy_at is not None and view.now >= view.version.destroy_at
    if not due or view.observed.deployed is None or view.app is not None:
        return []
    if view.version.artifact is None or view.ref in view.observed.deleted:
        return [Destroyed(view.ref)]
    return [DeleteReplica(view.ref, view.version.artifact.replica)]


_STEPS: dict[State, Callable[[_View], list[Action]]] = {
    State.PENDING: _materialising,
    State.MATERIALIZING: _materialising,
    State.STAGED: _staged,
    State.ACTIVE: _readdressed,
    State.DRAINING: lambda view: [*_readdressed(view), *_draining(view)],
    State.SUSPENDED: _readdressed,
    State.DESTROY_SCHEDULED: _destroying,
}


def _report_usage(desired: Desired, observed: Observed) -> Iterator[Action]:
    known = {Ref.of(version) for version in desired.versions}
    for ref, usage in sorted(observed.usage.items()):
        before = observed.reported.get(ref)
        if ref in known and (
            before is None or (before.source, before.tokens) != (usage.source, usage.tokens)
        ):
            yield ReportUsage(ref, usage)
