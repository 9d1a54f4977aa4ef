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
from posixpath import normpath

from anamorph.wire.admin import KeyVersionRead, ModelRead
from anamorph.wire.states import State
from anamorph_operator.actions import (
    Action,
    Activate,
    Apply,
    DeleteReplica,
    Destroyed,
    FailVersion,
    ReportUsage,
    Retire,
    StartJob,
    StopJob,
    Verify,
)
from anamorph_operator.applications import applications
from anamorph_operator.state import AppStatus, Desired, Job, Observed, Outcome, Ref

# Exit status of a job that refuses for good (contracts.md); it has said so itself.
EXIT_REFUSED = 3


@dataclass(frozen=True)
class Limits:
    """How much at once, how often, how patiently."""

    parallel_jobs: int = 1
    job_attempts: int = 4
    check_attempts: int = 20
    first_wait: timedelta = timedelta(seconds=2)
    longest_wait: timedelta = timedelta(seconds=60)

    def wait(self, attempts: int) -> timedelta:
        """Pause after that many failed attempts: doubling, up to the longest."""
        doubled: timedelta = self.first_wait * 2 ** max(0, min(attempts, 16) - 1)
        return min(doubled, self.longest_wait)


def plan(desired: Desired, observed: Observed, now: datetime, limits: Limits = Limits()) -> list[Action]:
    """Return the actions that bring what is there nearer to what is wanted, in order."""
    actions = [*_apply(desired, observed, now)]
    for version in desired.versions:
        step = _STEPS.get(version.state)
        model = desired.model_of(Ref.of(version))
        if step is not None and model is not None:
            actions += step(_View(desired, observed, now, limits, version, model))
    actions += _stop_jobs(desired, observed)
    actions += _start_jobs(desired, observed, now, limits)
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
    def endpoint(self) -> str:
        return self.desired.serve_url.rstrip("/") + self.ref.route

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
    """Give up what is refused or has failed too often; ``_start_jobs`` does the rest."""
    if not allowed(view.model.base, view.desired.allow_base):
        return [FailVersion(view.ref, "its base lies outside the operator's allow-list (--allow-base)")]
    job = view.observed.jobs.get(view.ref)
    if job is None or job.running:
        return []
    if job.exit_code == EXIT_REFUSED:
        return [FailVersion(view.ref, "materialisation was refused; the operator's log says why")]
    if job.attempts >= view.limits.job_attempts:
        return [FailVersion(view.ref, f"materialisation failed {job.attempts} times")]
    return []


def _staged(view: _View) -> list[Action]:
    if any(active.version > view.version.version for active in view.siblings(State.ACTIVE)):
        return [FailVersion(view.ref, "superseded: a newer version is active")]
    app = view.observed.app(view.ref)
    if app is not None and app.status is AppStatus.DEPLOY_FAILED:
        return [FailVersion(view.ref, "the serving side refused the replica; its log says why")]
    if not view.observed.running(view.ref):
        return []
    return _verified(view)


def _verified(view: _View) -> list[Action]:
    check, artifact = view.observed.checks.get(view.ref), view.version.artifact
    if check is not None and check.outcome is Outcome.EQUAL:
        return [Activate(view.ref, view.endpoint)]
    if check is not None and check.outcome is Outcome.DIFFERENT:
        return [FailVersion(view.ref, "the served replica does not answer what materialisation computed")]
    if check is not None and check.outcome is Outcome.RUNNING:
        return []
    if check is not None and check.attempts >= view.limits.check_attempts:
        return [FailVersion(view.ref, f"the served replica did not answer {check.attempts} probes")]
    if artifact is None or (check is not None and view.now < check.at + view.limits.wait(check.attempts)):
        return []
    return [Verify(view.ref, view.endpoint, view.version.require_key_id(), artifact.probe)]


def _draining(view: _View) -> list[Action]:
    """Retire after the deadline, once its successor answers and nothing is in flight.

    A caller that keeps using the old key may hold it up for one longest request
    more; after that it is retired regardless and its calls are answered 410.
    """
    if not any(view.observed.running(Ref.of(active)) for active in view.siblings(State.ACTIVE)):
        return []  # it may be the only one that answers
    deadline = view.version.drain_until
    if deadline is None or view.now < deadline:
        return []
    overdue = view.now >= deadline + timedelta(seconds=view.model.policy.longest_request_s)
    return [Retire(view.ref)] if _idle(view) or overdue else []


def _idle(view: _View) -> bool:
    app, usage = view.observed.app(view.ref), view.observed.usage.get(view.ref)
    if app is None or app.status is AppStatus.DEPLOY_FAILED:
        return True
    return app.status is AppStatus.RUNNING and usage is not None and usage.in_flight == 0


def _destroying(view: _View) -> list[Action]:
    """First the application, then the files, then the word that erases the key."""
    due = view.version.destroy_at is not None and view.now >= view.version.destroy_at
    if not due or view.observed.deployed is None or view.observed.app(view.ref) is not None:
        return []
    if view.version.artifact is None or view.ref in view.observed.deleted:
        return [Destroyed(view.ref)]
    return [DeleteReplica(view.ref, view.version.artifact.replica)]


_STEPS: dict[State, Callable[[_View], list[Action]]] = {
    State.PENDING: _materialising,
    State.MATERIALIZING: _materialising,
    State.STAGED: _staged,
    State.DRAINING: _draining,
    State.DESTROY_SCHEDULED: _destroying,
}
_WANTS_JOB = frozenset({State.PENDING, State.MATERIALIZING})


def _stop_jobs(desired: Desired, observed: Observed) -> Iterator[Action]:
    """A job is left to finish while its version is STAGED: it is only tidying up then."""
    keep = {Ref.of(v) for v in desired.versions if v.state in _WANTS_JOB | {State.STAGED}}
    return (StopJob(ref) for ref, job in sorted(observed.jobs.items()) if job.running and ref not in keep)


def _start_jobs(desired: Desired, observed: Observed, now: datetime, limits: Limits) -> list[Action]:
    free = limits.parallel_jobs - sum(job.running for job in observed.jobs.values())
    ready = [v for v in desired.versions if _startable(desired, observed, v, now, limits)]
    oldest = sorted(ready, key=lambda v: (v.created_at, Ref.of(v)))
    return [
        StartJob(Ref.of(version), model)
        for version in oldest[: max(0, free)]
        if (model := desired.model_of(Ref.of(version))) is not None
    ]


def _startable(
    desired: Desired, observed: Observed, version: KeyVersionRead, now: datetime, limits: Limits
) -> bool:
    model, job = desired.model_of(Ref.of(version)), observed.jobs.get(Ref.of(version))
    if version.state not in _WANTS_JOB or model is None or not allowed(model.base, desired.allow_base):
        return False
    if version.key_id is None:
        return False  # the key service is still preparing its key
    return job is None or _may_retry(job, now, limits)


def _may_retry(job: Job, now: datetime, limits: Limits) -> bool:
    if job.running or job.exit_code == EXIT_REFUSED or job.attempts >= limits.job_attempts:
        return False
    return job.ended_at is None or now >= job.ended_at + limits.wait(job.attempts)


def _report_usage(desired: Desired, observed: Observed) -> Iterator[Action]:
    known = {Ref.of(version) for version in desired.versions}
    for ref, usage in sorted(observed.usage.items()):
        before = observed.reported.get(ref)
        if ref in known and (
            before is None or (before.source, before.tokens) != (usage.source, usage.tokens)
        ):
            yield ReportUsage(ref, usage)


def allowed(base: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a base checkpoint lies under one of the allowed prefixes, path segment by segment."""
    scheme, separator, path = base.rpartition("://")
    wanted = scheme + separator + normpath(path)
    return any(_under(wanted, prefix) for prefix in prefixes)


def _under(wanted: str, prefix: str) -> bool:
    scheme, separator, path = prefix.rpartition("://")
    root = (scheme + separator + normpath(path)).rstrip("/")
    return wanted == root or wanted.startswith(root + "/")
