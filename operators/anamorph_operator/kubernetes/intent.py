"""What to do in the key service so that it has what a resource wants: a pure function.

Level-triggered: it compares how things stand and asks nothing of the past. Each step may be lost or
repeated; done until there are none, they lead to the same end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anamorph.wire.admin import KeyVersionRead, ModelRead, RotationPolicyPatch
from anamorph.wire.states import ONGOING, State
from anamorph_operator.kubernetes import records
from anamorph_operator.kubernetes.resources.objects import EncryptedModel

SUPERSEDED = "superseded: the resource wants another version"
DELETED = "the resource was deleted"
_PREPARING = frozenset({State.PENDING, State.MATERIALIZING, State.STAGED})


@dataclass(frozen=True)
class CreateModel:
    """Register the model.

    Args:
        fields: of ``ModelCreate``.
    """

    tenant: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class PatchModel:
    """Change the model's record; that counts for versions that are issued afterwards.

    Args:
        changes: the fields that differ, of ``records.SETTINGS``.
    """

    tenant: str
    model: str
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class PatchPolicy:
    """Change the rotation policy; no version is issued for it."""

    tenant: str
    model: str
    patch: RotationPolicyPatch


@dataclass(frozen=True)
class Rotate:
    """Issue the next version.

    Args:
        once: the same when it is said again before it was done, so that it can be an Idempotency-Key.
    """

    tenant: str
    model: str
    once: str


@dataclass(frozen=True)
class Fail:
    """Give up a version that is being made."""

    tenant: str
    model: str
    version: int
    reason: str


@dataclass(frozen=True)
class Revoke:
    """End a version that may be served: nothing is released or answered under it from now on."""

    tenant: str
    model: str
    version: int


@dataclass(frozen=True)
class Destroy:
    """Schedule the destruction of a version that has ended."""

    tenant: str
    model: str
    version: int


Step = CreateModel | PatchModel | PatchPolicy | Rotate | Fail | Revoke | Destroy


def steps(
    resource: EncryptedModel,
    record: ModelRead | None,
    versions: Sequence[KeyVersionRead],
    lies: Mapping[int, str],
    *,
    may_move: bool = True,
) -> list[Step]:
    """Return what to do next, in order; nothing if a fixed field of the record differs.

    Args:
        resource: what is wanted.
        record: of the model; ``None`` if there is none.
        versions: all of them, or at least the newest and those that are not over.
        lies: the cluster of each of these versions (``assignment.place``).
        may_move: whether there is room for the model where it wants to be.
    """
    if record is None:
        return [CreateModel(resource.tenant, records.creation(resource))]
    if records.mismatch(resource, record) is not None:
        return []
    patches = [*_patch_model(resource, record), *_patch_policy(resource, record)]
    return [*patches, *_rotation(resource, record, versions, lies, may_move=may_move)]


def _patch_model(resource: EncryptedModel, record: ModelRead) -> list[Step]:
    wanted, there = records.settings(resource), records.settings_of(record)
    changes = {name: value for name, value in wanted.items() if there[name] != value}
    return [PatchModel(resource.tenant, resource.model, changes)] if changes else []


def _patch_policy(resource: EncryptedModel, record: ModelRead) -> list[Step]:
    wanted, there = records.policy(resource.spec.rotation_policy).model_dump(), record.policy.model_dump()
    changes = {name: value for name, value in wanted.items() if there[name] != value}
    if not changes:
        return []
    return [PatchPolicy(resource.tenant, resource.model, RotationPolicyPatch.model_validate(changes))]


def _rotation(
    resource: EncryptedModel,
    record: ModelRead,
    versions: Sequence[KeyVersionRead],
    lies: Mapping[int, str],
    *,
    may_move: bool,
) -> list[Step]:
    """A rotation if the newest version is not what is wanted; one that is being made in vain is given up."""
    newest = max(versions, key=lambda version: version.version, default=None)
    if newest is None:
        return [_rotate(resource, record)] if record.last_version == 0 else []
    if newest.version != record.last_version:
        return []  # read at different moments: the next turn sees both
    outdated = _outdated(resource, newest, lies, may_move=may_move)
    if newest.state in _PREPARING:
        # A wish by annotation waits: there is one rotation at a time.
        give_up = Fail(resource.tenant, resource.model, newest.version, SUPERSEDED)
        return [give_up, _rotate(resource, record)] if outdated else []
    asked = resource.request is not None and answered(resource, versions) != resource.request
    return [_rotate(resource, record)] if outdated or asked or _anew(resource, versions) else []


def _outdated(
    resource: EncryptedModel, newest: KeyVersionRead, lies: Mapping[int, str], *, may_move: bool
) -> bool:
    """Whether the newest version was issued for something else, or lies elsewhere."""
    issued = records.issued_under(newest)
    elsewhere = lies.get(newest.version, resource.spec.serving_cluster) != resource.spec.serving_cluster
    return (elsewhere and may_move) or (issued is not None and issued != records.settings(resource))


def _anew(resource: EncryptedModel, versions: Sequence[KeyVersionRead]) -> bool:
    """Whether a new resource finds only versions of one that is gone."""
    known = bool(resource.status.versions)
    return not known and not any(version.state in ONGOING | {State.FAILED} for version in versions)


def _rotate(resource: EncryptedModel, record: ModelRead) -> Rotate:
    metadata = resource.metadata
    wish = f"{metadata.uid}\n{metadata.generation}\n{record.last_version}\n{resource.request or ''}"
    return Rotate(resource.tenant, resource.model, hashlib.sha256(wish.encode()).hexdigest()[:32])


def answered(resource: EncryptedModel, versions: Sequence[KeyVersionRead]) -> str | None:
    """The text of the annotation that has been acted on, for the status.

    The status lists every version, so one that is newer than what it lists was issued since: that
    answers the request that there is, whoever asked for it. So a rotation whose answer was lost is not
    repeated.
    """
    listed = max((one.version for one in resource.status.versions), default=0)
    newest = max((version.version for version in versions), default=0)
    return resource.request if newest > listed else resource.status.rotate_request


def removal(resource: EncryptedModel, versions: Sequence[KeyVersionRead]) -> list[Step]:
    """What to do for a resource that is being deleted: one step nearer to its end for each version.

    A key that clients may hold has to be revoked first, and what was revoked is not restored.

    Args:
        resource: what is being deleted.
        versions: all of them.
    """
    found = (_ending(resource, version) for version in versions)
    return [step for step in found if step is not None]


def _ending(resource: EncryptedModel, version: KeyVersionRead) -> Step | None:
    place = (resource.tenant, resource.model, version.version)
    if version.state in _PREPARING:
        return Fail(*place, DELETED)
    if version.state in {State.ACTIVE, State.DRAINING, State.SUSPENDED}:
        return Revoke(*place)
    if version.state in {State.RETIRED, State.FAILED, State.COMPROMISED}:
        return Destroy(*place)
    return None  # its destruction is scheduled, or over
