"""What stands in a resource's way, as values: each becomes the reason of a condition."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from anamorph import errors


class Problem(StrEnum):
    """One word for each."""

    NAMESPACE_NOT_BOUND = "NamespaceNotBound"
    DUPLICATE = "Duplicate"
    KEY_SERVICE_AWAY = "KeyServiceAway"
    TENANT_UNKNOWN = "TenantUnknown"
    QUOTA_EXCEEDED = "QuotaExceeded"
    RECORD_DIFFERS = "RecordDiffers"
    REFUSED = "Refused"
    NO_ROOM = "NoRoom"
    CLUSTER_UNKNOWN = "ClusterUnknown"
    CLUSTER_FULL = "ClusterFull"


Troubles = Mapping[Problem, str]
"""What there is of them, with what to do about it."""


def of_key_service(error: errors.AnamorphError) -> dict[Problem, str]:
    """What an answer of the key service means for the resource that it was asked for.

    Nothing for a conflict or a limit, which the next turn resolves.
    """
    if isinstance(error, errors.ServiceError) and error.code == "quota_exceeded":
        return {Problem.QUOTA_EXCEEDED: str(error)}
    for kind, problem in _OF_ERROR.items():
        if isinstance(error, kind):
            return {problem: str(error)} if problem else {}
    return {Problem.REFUSED: str(error)}


_OF_ERROR: dict[type[errors.AnamorphError], Problem | None] = {
    errors.Unavailable: Problem.KEY_SERVICE_AWAY,
    errors.Unauthenticated: Problem.KEY_SERVICE_AWAY,
    errors.NotFound: Problem.TENANT_UNKNOWN,
    errors.Conflict: None,
    errors.PreconditionFailed: None,
    errors.TooManyRequests: None,
}
