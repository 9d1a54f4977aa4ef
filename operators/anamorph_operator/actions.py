"""What the operator can do: one frozen value per action, carrying all that it needs.

Every action may be repeated, and the process may die before, during or after any of
them: the next plan is made from what is then observed.
"""

from __future__ import annotations

from dataclasses import dataclass

from anamorph.wire.admin import ModelRead, Probe
from anamorph.wire.serving import Usage
from anamorph_operator.state import Application, Ref


@dataclass(frozen=True)
class StartJob:
    """Ask the key service for a grant and materialise in a process of its own."""

    ref: Ref
    model: ModelRead


@dataclass(frozen=True)
class StopJob:
    """End a job whose version no longer wants a replica."""

    ref: Ref


@dataclass(frozen=True)
class FailVersion:
    """Give a version up; whatever is ACTIVE stays as it is."""

    ref: Ref
    reason: str


@dataclass(frozen=True)
class Hold:
    """Say why a version waits; it is begun as soon as there is room."""

    ref: Ref
    reason: str


@dataclass(frozen=True)
class Apply:
    """Write the whole list of Ray Serve applications: one writer, always all of them."""

    applications: tuple[Application, ...]


@dataclass(frozen=True)
class Verify:
    """Ask the served replica for the continuations that materialisation computed."""

    ref: Ref
    endpoint: str
    key_id: str
    probe: Probe


@dataclass(frozen=True)
class Activate:
    """Make a verified version the one that clients use; the former one drains."""

    ref: Ref
    endpoint: str


@dataclass(frozen=True)
class Readdress:
    """Tell clients of a version that is served where it is reached by now."""

    ref: Ref
    endpoint: str


@dataclass(frozen=True)
class Retire:
    """End a drained version in the key service; its application goes afterwards."""

    ref: Ref


@dataclass(frozen=True)
class DeleteReplica:
    """Remove a published replica from storage."""

    ref: Ref
    url: str


@dataclass(frozen=True)
class Destroyed:
    """Report that nothing of a version is left, so that its key row may be erased."""

    ref: Ref


@dataclass(frozen=True)
class ReportUsage:
    """Tell the key service how many tokens an engine process has served."""

    ref: Ref
    usage: Usage


Action = (
    StartJob
    | StopJob
    | FailVersion
    | Hold
    | Apply
    | Verify
    | Activate
    | Readdress
    | Retire
    | DeleteReplica
    | Destroyed
    | ReportUsage
)
