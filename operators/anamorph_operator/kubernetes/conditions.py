"""The conditions of an ``EncryptedModel``: a pure function of what is known.

Each is *True*, *False* or, where whoever knows does not answer, *Unknown*; each with one word why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from anamorph.wire.admin import KeyVersionRead, ModelRead
from anamorph.wire.states import GONE, ONGOING, State
from anamorph_operator.begin import BASE_OUTSIDE
from anamorph_operator.kubernetes.trouble import Problem, Troubles
from anamorph_operator.state import AppStatus, Deployed, Observed, Outcome, Ref

Status = Literal["True", "False", "Unknown"]
PREPARING = frozenset({State.PENDING, State.MATERIALIZING, State.STAGED})
NEEDED = ("KeyIssued", "Materialized", "Verified", "Serving")
"""What a model needs to be ready, in the order in which it comes about."""


class Verdict(NamedTuple):
    """What a condition says."""

    status: Status
    reason: str
    message: str = ""


@dataclass(frozen=True)
class Known:
    """What is known of one model.

    Args:
        record: ``None`` if there is none yet, or the key service does not answer.
        versions: all of them, or at least the newest and those that are not over.
        observed: the cluster of the active version, or of the newest where none is active; ``None`` if
            it does not answer.
        troubles: what stands in its way.
    """

    record: ModelRead | None = None
    versions: tuple[KeyVersionRead, ...] = ()
    observed: Observed | None = None
    troubles: Troubles = field(default_factory=dict)

    @cached_property
    def newest(self) -> KeyVersionRead | None:
        return max(self.versions, key=lambda version: version.version, default=None)

    @cached_property
    def active(self) -> KeyVersionRead | None:
        return self.newest_in(State.ACTIVE)

    def newest_in(self, *states: State) -> KeyVersionRead | None:
        """The newest version in one of these states."""
        found = (version for version in self.versions if version.state in states)
        return max(found, key=lambda version: version.version, default=None)

    @cached_property
    def current(self) -> tuple[KeyVersionRead, ...]:
        """The versions that count: those that are not over, or else the newest."""
        ongoing = tuple(version for version in self.versions if version.state in ONGOING)
        return ongoing or ((self.newest,) if self.newest else ())

    @property
    def failed(self) -> KeyVersionRead | None:
        """The newest version, if it has failed."""
        return self.newest if self.newest is not None and self.newest.state is State.FAILED else None

    def app(self, version: KeyVersionRead) -> Deployed | None:
        """The application that serves a version."""
        return None if self.observed is None else self.observed.app(Ref.of(version), self.record)

    def trouble(self, *problems: Problem) -> Verdict | None:
        """The first of these problems that there is."""
        found = (problem for problem in problems if problem in self.troubles)
        problem = next(found, None)
        return None if problem is None else Verdict("False", problem.value, self.troubles[problem])


def verdicts(known: Known) -> dict[str, Verdict]:
    """What each condition says, ``Ready`` first."""
    found = {kind: judge(known) for kind, judge in _JUDGES.items()}
    return {"Ready": ready(found), **found}


def ready(found: Mapping[str, Verdict]) -> Verdict:
    """The first of the conditions that a model needs that is not *True*."""
    needed = (found[kind] for kind in NEEDED)
    return next((one for one in needed if one.status != "True"), Verdict("True", "Ready"))


_BEFORE_A_KEY = (
    Problem.NAMESPACE_NOT_BOUND,
    Problem.DUPLICATE,
    Problem.TENANT_UNKNOWN,
    Problem.RECORD_DIFFERS,
    Problem.QUOTA_EXCEEDED,
    Problem.REFUSED,
)
_NO_PLACE = (Problem.CLUSTER_UNKNOWN, Problem.CLUSTER_FULL, Problem.NO_ROOM)


def _key_issued(known: Known) -> Verdict:
    if any(version.key_id is not None for version in known.current):
        return Verdict("True", "Issued")
    found = known.trouble(*_BEFORE_A_KEY)
    return found or Verdict("False", "Pending")


def _materialized(known: Known) -> Verdict:
    if any(version.artifact is not None for version in known.current):
        return Verdict("True", "Published")
    if known.failed is not None:
        refused = known.failed.failure == BASE_OUTSIDE
        return Verdict("False", "BaseRefused" if refused else "Failed", known.failed.failure or "")
    jobs = {} if known.observed is None else known.observed.jobs
    running = any(job.running for v in known.current if (job := jobs.get(Ref.of(v))) is not None)
    if running:
        return Verdict("False", "Folding")
    return known.trouble(*_NO_PLACE) or Verdict("False", "Waiting")


def _verified(known: Known) -> Verdict:
    if any(version.activated_at is not None for version in known.current):
        return Verdict("True", "Activated")
    newest = known.newest
    checks = {} if known.observed is None else known.observed.checks
    check = None if newest is None else checks.get(Ref.of(newest))
    if check is not None and check.outcome in _OUTCOMES:
        return Verdict("False", _OUTCOMES[check.outcome], _failure(known))
    if known.failed is not None:
        return Verdict("False", "Failed", _failure(known))
    staged = newest is not None and newest.state is State.STAGED
    return Verdict("False", "Probing" if staged else "Waiting")


_OUTCOMES = {
    Outcome.DIFFERENT: "Different",
    Outcome.UNREACHABLE: "Unreachable",
    Outcome.REFUSED: "Refused",
}


def _failure(known: Known) -> str:
    return "" if known.failed is None else known.failed.failure or ""


def _serving(known: Known) -> Verdict:
    if known.active is None:
        return _nothing_active(known)
    if known.observed is None or known.observed.deployed is None:
        return Verdict("Unknown", "ClusterAway", "Ray's dashboard does not answer; what is served may go on")
    app = known.app(known.active)
    if app is not None and app.status is AppStatus.RUNNING:
        return Verdict("True", "OnDemand" if _may_sleep(known) else "Running")
    if app is not None and app.status in {AppStatus.DEPLOY_FAILED, AppStatus.UNHEALTHY}:
        return Verdict("False", "Failed", app.message)
    return known.trouble(Problem.CLUSTER_FULL) or Verdict("False", "Deploying")


def _may_sleep(known: Known) -> bool:
    return known.record is not None and known.record.serving.autoscaling.min_replicas == 0


def _nothing_active(known: Known) -> Verdict:
    if known.newest_in(State.SUSPENDED) is not None:
        return Verdict("False", "Suspended", "resume the version in the key service, or rotate")
    over = known.newest is not None and known.newest.state in GONE
    if over and not any(version.state in ONGOING for version in known.versions):
        return Verdict("False", "Ended", "its last version has ended: rotate to serve the model again")
    held = known.trouble(*_NO_PLACE)
    if held is not None:
        return held
    return Verdict("False", "Failed", _failure(known)) if known.failed else Verdict("False", "Waiting")


def _rotating(known: Known) -> Verdict:
    preparing = known.newest_in(*PREPARING)
    held = known.trouble(*_NO_PLACE)
    if known.active is None or preparing is None or preparing.version < known.active.version:
        return held if known.active is not None and held is not None else Verdict("False", "Settled")
    message = f"version {preparing.version}" + (f" waits: {held.message}" if held else "")
    return Verdict("True", _PHASES[preparing.state], message)


_PHASES = {State.PENDING: "Issuing", State.MATERIALIZING: "Folding", State.STAGED: "Probing"}


def _draining(known: Known) -> Verdict:
    draining = sorted(v.version for v in known.versions if v.state is State.DRAINING)
    if not draining:
        return Verdict("False", "Settled")
    return Verdict("True", "Draining", "version " + ", ".join(map(str, draining)))


def _degraded(known: Known) -> Verdict:
    refused = known.trouble(*_BEFORE_A_KEY)
    if refused is not None and _key_issued(known).status == "True":
        return refused._replace(status="True")  # it goes on as it is, and what is wanted now does not come
    if known.failed is not None:
        return Verdict("True", "Failed", f"version {known.failed.version}: {_failure(known)}")
    serving = _serving(known)
    if known.active is not None and serving.status == "False":
        return Verdict("True", "NotAnswering", serving.message)
    return Verdict("False", "Settled")


_JUDGES: dict[str, Callable[[Known], Verdict]] = {
    "KeyIssued": _key_issued,
    "Materialized": _materialized,
    "Verified": _verified,
    "Serving": _serving,
    "Rotating": _rotating,
    "Draining": _draining,
    "Degraded": _degraded,
}
