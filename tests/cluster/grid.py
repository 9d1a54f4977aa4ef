"""Every fault at every step of a rotation: the cases, and how a step is told from what is known."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from enum import StrEnum

from anamorph.wire.admin import KeyVersionRead
from anamorph.wire.serving import app_name
from anamorph.wire.states import State


class Fault(StrEnum):
    """What is lost."""

    OPERATOR = "operator"
    KEY_SERVICE = "keysvc"
    VAULT = "vault"
    HEAD = "head"
    WORKER = "worker"
    JOB = "job"


class Step(StrEnum):
    """How far a rotation is, in the order in which it gets there."""

    ASKED = "asked"
    ISSUED = "issued"
    FOLDING = "folding"
    PUBLISHED = "published"
    PROBING = "probing"
    DRAINING = "draining"

    def before(self, other: Step) -> bool:
        """Whether a rotation gets here first."""
        return _ORDER[self] < _ORDER[other]


_ORDER = {step: number for number, step in enumerate(Step)}

LEFT_OUT: Mapping[tuple[Fault, Step], str] = {
    (Fault.JOB, Step.ASKED): "there is no Job before there is a key",
    (Fault.JOB, Step.PUBLISHED): "what is left of the Job only tidies up",
    (Fault.JOB, Step.PROBING): "the Job is over",
    (Fault.JOB, Step.DRAINING): "the Job is over",
}
"""Cases that make no sense, each with why."""


def cases() -> Iterator[tuple[Fault, Step]]:
    """The grid, fault by fault, without what is left out."""
    return ((fault, step) for fault in Fault for step in Step if (fault, step) not in LEFT_OUT)


_STEPS = {State.PENDING: Step.ISSUED, State.MATERIALIZING: Step.FOLDING}


def step_of(newest: KeyVersionRead | None, before: KeyVersionRead, served: Collection[str]) -> Step | None:
    """Where a rotation stands; ``None`` when it is over, well or not.

    Args:
        newest: the version that was asked for, once the key service has it.
        before: the one that was active when it was asked for.
        served: names of the applications in ``serveConfigV2``.
    """
    if newest is None or (newest.state is State.PENDING and newest.key_id is None):
        return Step.ASKED
    if newest.state is State.STAGED:
        name = app_name(newest.tenant, newest.model, newest.version)
        return Step.PROBING if name in served else Step.PUBLISHED
    if newest.state is State.ACTIVE:
        return Step.DRAINING if before.state in {State.ACTIVE, State.DRAINING} else None
    return _STEPS.get(newest.state)


def missed(seen: Step | None, wanted: Step) -> bool:
    """Whether a rotation has passed a step, so that another one has to be asked for."""
    return seen is None or wanted.before(seen)
