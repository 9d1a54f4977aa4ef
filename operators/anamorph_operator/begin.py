"""Which materialisation jobs begin, which end, and which have to wait for room."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from posixpath import normpath

from anamorph.serve.cluster.placement import Demand
from anamorph.wire.admin import KeyVersionRead
from anamorph.wire.states import State
from anamorph_operator import capacity
from anamorph_operator.actions import Action, FailVersion, Hold, StartJob, StopJob
from anamorph_operator.applications import applications
from anamorph_operator.state import Desired, Job, Observed, Ref

# Exit status of a job that refuses for good (contracts.md); it has said so itself.
EXIT_REFUSED = 3
# Why a version is given up whose base is not allowed; told apart by it.
BASE_OUTSIDE = "its base lies outside the operator's allow-list (--allow-base)"


@dataclass(frozen=True)
class Limits:
    """How much at once, how often, how patiently.

    Args:
        nodes_change: whether nodes come and go, so that what fits none of those that are there waits for
            others, and is not given up.
    """

    parallel_jobs: int = 1
    job_attempts: int = 4
    check_attempts: int = 20
    first_wait: timedelta = timedelta(seconds=2)
    longest_wait: timedelta = timedelta(seconds=60)
    nodes_change: bool = False

    def wait(self, attempts: int) -> timedelta:
        """Pause after that many failed attempts: doubling, up to the longest."""
        doubled: timedelta = self.first_wait * 2 ** max(0, min(attempts, 16) - 1)
        return min(doubled, self.longest_wait)


_WANTS_JOB = frozenset({State.PENDING, State.MATERIALIZING})


def stop_jobs(desired: Desired, observed: Observed) -> Iterator[Action]:
    """A job is left to finish while its version is STAGED: it is only tidying up then."""
    keep = {Ref.of(v) for v in desired.versions if v.state in _WANTS_JOB | {State.STAGED}}
    return (StopJob(ref) for ref, job in sorted(observed.jobs.items()) if job.running and ref not in keep)


def start_jobs(desired: Desired, observed: Observed, now: datetime, limits: Limits) -> Iterator[Action]:
    """The oldest first, as long as there is room; who has to wait does not make others wait."""
    free = limits.parallel_jobs - sum(job.running for job in observed.jobs.values())
    ready = [v for v in desired.versions if _startable(desired, observed, v, now, limits)]
    standing = applications(desired, observed, now) if ready else ()
    taken = coming(desired, observed)
    for version in sorted(ready, key=lambda v: (v.created_at, Ref.of(v))):
        model = desired.model_of(Ref.of(version))
        if model is None:
            continue
        wanted = capacity.wanted(desired, observed, Ref.of(version), model)
        found = capacity.no_room(observed, standing, taken, wanted)
        if found is not None:
            yield _without_room(wanted.ref, found, limits)
        elif free > 0:
            free -= 1
            taken += [wanted.demand] if wanted.demand is not None else []
            yield StartJob(wanted.ref, model)


def _without_room(ref: Ref, found: capacity.NoRoom, limits: Limits) -> Action:
    if not found.never:
        return Hold(ref, found.reason)
    reason = f"it would not fit on the empty cluster: {found.reason}"
    return Hold(ref, reason) if limits.nodes_change else FailVersion(ref, reason)


def coming(desired: Desired, observed: Observed) -> list[Demand]:
    """What the versions that are being materialised will take."""
    return [demand for v in desired.versions if (demand := _coming(desired, observed, v)) is not None]


def _coming(desired: Desired, observed: Observed, version: KeyVersionRead) -> Demand | None:
    """What a version that is being materialised will take."""
    model, job = desired.model_of(Ref.of(version)), observed.jobs.get(Ref.of(version))
    if model is None or job is None or not job.running or version.state not in _WANTS_JOB:
        return None
    return capacity.wanted(desired, observed, Ref.of(version), model).demand


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


def allowed(base: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a base checkpoint lies under one of the allowed prefixes, path segment by segment."""
    scheme, separator, path = base.rpartition("://")
    wanted = scheme + separator + normpath(path)
    return any(_under(wanted, prefix) for prefix in prefixes)


def _under(wanted: str, prefix: str) -> bool:
    scheme, separator, path = prefix.rpartition("://")
    root = (scheme + separator + normpath(path)).rstrip("/")
    return wanted == root or wanted.startswith(root + "/")
