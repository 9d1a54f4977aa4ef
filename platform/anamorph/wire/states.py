"""States of a key version and the transitions between them (keyservice.md)."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Life of one key version."""

    PENDING = "PENDING"
    MATERIALIZING = "MATERIALIZING"
    STAGED = "STAGED"
    ACTIVE = "ACTIVE"
    DRAINING = "DRAINING"
    RETIRED = "RETIRED"
    SUSPENDED = "SUSPENDED"
    COMPROMISED = "COMPROMISED"
    FAILED = "FAILED"
    DESTROY_SCHEDULED = "DESTROY_SCHEDULED"
    DESTROYED = "DESTROYED"


S = State

# Anything living may become COMPROMISED.
LIVING = frozenset({S.PENDING, S.MATERIALIZING, S.STAGED, S.ACTIVE, S.DRAINING, S.SUSPENDED, S.RETIRED})

TRANSITIONS: dict[State, frozenset[State]] = {
    S.PENDING: frozenset({S.MATERIALIZING, S.FAILED, S.COMPROMISED}),
    S.MATERIALIZING: frozenset({S.STAGED, S.FAILED, S.COMPROMISED}),
    S.STAGED: frozenset({S.ACTIVE, S.FAILED, S.COMPROMISED}),
    S.ACTIVE: frozenset({S.DRAINING, S.SUSPENDED, S.COMPROMISED}),
    S.DRAINING: frozenset({S.RETIRED, S.SUSPENDED, S.COMPROMISED}),
    S.SUSPENDED: frozenset({S.ACTIVE, S.DRAINING, S.COMPROMISED}),
    S.RETIRED: frozenset({S.DESTROY_SCHEDULED, S.COMPROMISED}),
    S.COMPROMISED: frozenset({S.DESTROY_SCHEDULED}),
    S.FAILED: frozenset({S.DESTROY_SCHEDULED}),
    S.DESTROY_SCHEDULED: frozenset({S.RETIRED, S.DESTROYED}),
    S.DESTROYED: frozenset(),
}

# Client material leaves only here; MATERIALIZING releases the root to its one grant.
CLIENT_RELEASE = frozenset({S.STAGED, S.ACTIVE, S.DRAINING})
# A replica of these states may stand in the compute zone.
SERVABLE = frozenset({S.STAGED, S.ACTIVE, S.DRAINING, S.SUSPENDED})
# What the operator looks at in every turn: versions that are being made, or may be served.
ONGOING = LIVING - {S.RETIRED}
# What the data plane answers for a version that is no longer served.
GONE = frozenset({S.RETIRED, S.COMPROMISED, S.DESTROY_SCHEDULED, S.DESTROYED})
