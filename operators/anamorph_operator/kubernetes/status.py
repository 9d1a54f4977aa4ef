"""The status of a resource: a pure function of what is known and of the status that it has.

What has not changed stays as it is, to the second: so nothing is written when nothing has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime

from anamorph.wire.admin import KeyVersionRead
from anamorph_operator.applications import DOOR
from anamorph_operator.kubernetes.assignment import Assignment, Places, models_on, place
from anamorph_operator.kubernetes.conditions import Known, Verdict, ready, verdicts
from anamorph_operator.kubernetes.intent import answered
from anamorph_operator.kubernetes.resources.encrypted_model import (
    MOST_VERSIONS,
    EncryptedModelStatus,
    VersionStatus,
)
from anamorph_operator.kubernetes.resources.objects import EncryptedModel, ServingCluster
from anamorph_operator.kubernetes.resources.part import Condition, Part
from anamorph_operator.kubernetes.resources.serving_cluster import ServingClusterStatus
from anamorph_operator.kubernetes.trouble import Problem
from anamorph_operator.state import AppStatus, Observed

_LONGEST = 1024


def model_status(
    resource: EncryptedModel, known: Known, places: Places, now: datetime
) -> EncryptedModelStatus:
    """How a model stands.

    While the key service does not answer, what it said last stays; only that no key has been issued
    becomes *Unknown*.

    Args:
        resource: as the API server holds it.
        known: what is known of it.
        places: of all clusters, as in ``assignment``.
        now: when a condition that changes has changed.
    """
    if Problem.KEY_SERVICE_AWAY in known.troubles:
        return _key_service_away(resource, known, now)
    conditions = _conditions(resource, verdicts(known), now)
    active = known.active
    return EncryptedModelStatus(
        observed_generation=resource.metadata.generation,
        conditions=conditions,
        versions=tuple(_version(resource, version, places) for version in _newest(known.versions)),
        active_version=None if active is None else active.version,
        endpoint=None if active is None else active.endpoint,
        rotate_request=answered(resource, known.versions),
    )


def _newest(versions: Iterable[KeyVersionRead]) -> list[KeyVersionRead]:
    return sorted(versions, key=lambda version: version.version, reverse=True)[:MOST_VERSIONS]


def _version(resource: EncryptedModel, version: KeyVersionRead, places: Places) -> VersionStatus:
    return VersionStatus(
        version=version.version,
        state=version.state.value,
        key_id=version.key_id,
        serving_cluster=place(resource, version, places),
    )


def _key_service_away(resource: EncryptedModel, known: Known, now: datetime) -> EncryptedModelStatus:
    """The status that there is; the generation stays too, as nothing of a new one has been acted on."""
    said = verdicts(known) | {
        one.type: Verdict(one.status, one.reason, one.message) for one in resource.status.conditions
    }
    if said["KeyIssued"].status != "True":
        message = known.troubles[Problem.KEY_SERVICE_AWAY]
        said["KeyIssued"] = Verdict("Unknown", Problem.KEY_SERVICE_AWAY.value, message)
    said["Ready"] = ready(said)
    conditions = _conditions(resource, said, now, generation=resource.status.observed_generation)
    return resource.status.model_copy(update={"conditions": conditions})


def cluster_status(
    cluster: ServingCluster,
    assignment: Assignment,
    observed: Observed | None,
    urls: tuple[str, str],
    now: datetime,
    trouble: str | None = None,
) -> ServingClusterStatus:
    """How a serving cluster stands.

    Args:
        cluster: as the API server holds it.
        assignment: what it keeps.
        observed: what stands there; ``None`` if it does not answer.
        urls: where Serve listens, as seen from the operator and from clients.
        now: when a condition that changes has changed.
        trouble: why it could not be written, if it could not.
    """
    deployed = None if observed is None else observed.deployed
    models = models_on(assignment)
    said = {
        "Ready": _cluster_ready(observed, trouble),
        "CapacityLeft": _capacity_left(assignment),
    }
    return ServingClusterStatus(
        observed_generation=cluster.metadata.generation,
        conditions=_conditions(cluster, said, now),
        applications=cluster.status.applications if deployed is None else len(deployed),
        models=models,
        serve_url=urls[0],
        public_url=urls[1],
    )


def _cluster_ready(observed: Observed | None, trouble: str | None) -> Verdict:
    if trouble is not None:
        return Verdict("False", "Refused", trouble)
    if observed is None or observed.deployed is None:
        return Verdict("Unknown", "ClusterAway", "Ray's dashboard does not answer")
    door = observed.deployed.get(DOOR)
    if door is not None and door.status is AppStatus.RUNNING:
        return Verdict("True", "Running")
    failed = door is not None and door.status in {AppStatus.DEPLOY_FAILED, AppStatus.UNHEALTHY}
    return Verdict("False", "Failed" if failed else "Deploying", door.message if door and failed else "")


def _capacity_left(assignment: Assignment) -> Verdict:
    if assignment.left > 0:
        return Verdict("True", "Room")
    names = ", ".join(sorted("/".join(key) for key in assignment.full))
    return Verdict("False", "Full", f"no room for {names}: make another cluster" if names else "")


def _conditions(
    of: EncryptedModel | ServingCluster,
    said: Mapping[str, Verdict],
    now: datetime,
    generation: int | None = None,
) -> tuple[Condition, ...]:
    """Conditions that say this; the time of one whose status stays is the one that it has."""
    before = {condition.type: condition for condition in of.status.conditions}
    seen = of.metadata.generation if generation is None else generation
    return tuple(_condition(kind, verdict, before.get(kind), now, seen) for kind, verdict in said.items())


def _condition(
    kind: str, verdict: Verdict, before: Condition | None, now: datetime, generation: int
) -> Condition:
    same = before is not None and before.status == verdict.status
    return Condition(
        type=kind,
        status=verdict.status,
        reason=verdict.reason,
        message=verdict.message[:_LONGEST],
        last_transition_time=before.last_transition_time if before and same else now.replace(microsecond=0),
        observed_generation=generation,
    )


def differs(old: Part, new: Part) -> bool:
    """Whether a status has to be written."""
    return old.manifest() != new.manifest()
