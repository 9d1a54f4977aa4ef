"""Which cluster a version lies on, which models one reconciler keeps, and for which there is no room.

A version lies where the status of its resource says, which saw it first; without a status of it, where
its endpoint says, and before it has one, where the resource wants it. So a model that moves keeps its old
versions where they are, and a cluster may get another address, also one that was another's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from anamorph.wire.admin import KeyVersionRead, ModelRead
from anamorph.wire.serving import route_prefix
from anamorph.wire.states import SERVABLE
from anamorph_operator import capacity
from anamorph_operator.applications import applications
from anamorph_operator.begin import coming
from anamorph_operator.kubernetes.resources.objects import EncryptedModel, ServingCluster
from anamorph_operator.state import Desired, Observed, Ref

Key = tuple[str, str]
"""Tenant and model."""
Places = Mapping[str, str]
"""For each serving cluster, the URL under which clients reach its models."""


def place(resource: EncryptedModel, version: KeyVersionRead, places: Places) -> str:
    """Name of the cluster that a version lies on."""
    kept = next(
        (one.serving_cluster for one in resource.status.versions if one.version == version.version), None
    )
    if kept is not None and kept in places:
        return kept
    if version.endpoint is not None:
        route = route_prefix(version.tenant, version.model, version.version)
        said = version.endpoint.rstrip("/").removesuffix(route)
        found = [name for name, url in places.items() if url.rstrip("/") == said]
        if len(found) == 1:
            return found[0]
    return kept or resource.spec.serving_cluster


@dataclass(frozen=True)
class Assignment:
    """What one serving cluster keeps.

    Args:
        cluster: its name.
        resources: every ``EncryptedModel``, of all clusters.
        places: of all clusters.
        full: models that are wanted here and find no room.
        left: applications that may still come.
    """

    cluster: str
    resources: Mapping[Key, EncryptedModel]
    places: Places
    full: frozenset[Key] = frozenset()
    left: int = 0

    def select(
        self, models: tuple[ModelRead, ...], versions: tuple[KeyVersionRead, ...]
    ) -> tuple[tuple[ModelRead, ...], tuple[KeyVersionRead, ...]]:
        """The ``Select`` of the cluster's reconciler.

        A model's last version is the last that may be here: of a later one, its door knows nothing.
        """
        known = [(v, self.resources[v.tenant, v.model]) for v in versions if _key(v) in self.resources]
        here = [v for v, resource in known if place(resource, v, self.places) == self.cluster]
        elsewhere = [v for v, resource in known if place(resource, v, self.places) != self.cluster]
        taken = {_key(version) for version in here}
        chosen = [m for m in models if self._keeps(_model_key(m), taken)]
        kept = tuple(v for v in here if _key(v) not in self.full)
        mine, others = _numbers(here), _numbers(elsewhere)
        until = (_until(m, mine[_model_key(m)], others[_model_key(m)]) for m in chosen)
        return tuple(until), kept

    def _keeps(self, key: Key, taken: set[Key]) -> bool:
        """Whether a model's record is needed here: also while something of a former version may stand."""
        resource = self.resources.get(key)
        if resource is None or key in self.full:
            return False
        was = any(one.serving_cluster == self.cluster for one in resource.status.versions)
        return key in taken or was or resource.spec.serving_cluster == self.cluster


def _numbers(versions: Iterable[KeyVersionRead]) -> Mapping[Key, list[int]]:
    found = defaultdict(list)
    for version in versions:
        found[_key(version)].append(version.version)
    return found


def _until(model: ModelRead, here: list[int], elsewhere: list[int]) -> ModelRead:
    later = [version for version in elsewhere if version > max(here, default=0)]
    return model.model_copy(update={"last_version": min(later) - 1}) if later else model


def assign(
    cluster: ServingCluster,
    resources: Iterable[EncryptedModel],
    versions: Iterable[KeyVersionRead],
    places: Places,
) -> Assignment:
    """Which models find room on a cluster: those that are served first, then in the order of creation.

    Args:
        cluster: the serving cluster.
        resources: every ``EncryptedModel``, of all clusters.
        versions: those that may still have to be acted on, of all models.
        places: of all clusters.
    """
    by_key = owners(resources)
    served = {_key(v) for v in versions if _served_on(cluster.name, by_key.get(_key(v)), v, places)}
    wanting = [r for r in by_key.values() if r.key in served or r.spec.serving_cluster == cluster.name]
    room = _Room(cluster)
    full = set()
    for resource in sorted(wanting, key=lambda r: (r.key not in served, *_order(r))):
        if not room.take(resource) and resource.key not in served:
            full.add(resource.key)
    return Assignment(cluster.name, by_key, places, frozenset(full), room.left)


def owners(resources: Iterable[EncryptedModel]) -> dict[Key, EncryptedModel]:
    """For each model its resource: the oldest, where several name the same one."""
    newest_first = sorted(resources, key=_order, reverse=True)
    return {resource.key: resource for resource in newest_first}


def models_on(assignment: Assignment) -> int:
    """How many models are wanted on a cluster and find room."""
    wanted = {r.key for r in assignment.resources.values() if r.spec.serving_cluster == assignment.cluster}
    return len(wanted - assignment.full)


class _Room:
    """Counts applications: one for each baseline, each pool, each model that has its own."""

    def __init__(self, cluster: ServingCluster) -> None:
        self._most = cluster.spec.max_applications
        self._taken = len(cluster.spec.baselines)
        self._pools: set[str] = set()

    @property
    def left(self) -> int:
        """Applications that may still come."""
        return max(0, self._most - self._taken)

    def take(self, resource: EncryptedModel) -> bool:
        """Count a model; whether it is within the bound."""
        pool = resource.spec.serving.pool
        if pool is not None and pool in self._pools:
            return True
        if pool is not None:
            self._pools.add(pool)
        self._taken += 1
        if self._taken <= self._most:
            return True
        # Who finds no room takes none, so that a member of a pool that is there still does.
        self._taken -= 1
        self._pools.discard(pool or "")
        return False


def _served_on(
    cluster: str, resource: EncryptedModel | None, version: KeyVersionRead, places: Places
) -> bool:
    """Whether a version is being served on a cluster, or is about to be."""
    if resource is None or version.state not in SERVABLE:
        return False
    return place(resource, version, places) == cluster


def _order(resource: EncryptedModel) -> tuple[object, ...]:
    metadata = resource.metadata
    return metadata.created_at, metadata.namespace, metadata.name


def no_room_for(
    assignment: Assignment,
    resource: EncryptedModel,
    model: ModelRead,
    desired: Desired,
    observed: Observed,
    now: datetime,
) -> str | None:
    """Why a model cannot move to a cluster now, in words; ``None`` if it can.

    Args:
        assignment: of the cluster that it is to move to.
        resource: what is wanted of it.
        model: its record.
        desired: of that cluster's reconciler.
        observed: by that cluster's reconciler.
        now: which applications of it are being deployed anew.
    """
    if resource.key in assignment.full:
        return f"serving cluster '{assignment.cluster}' is full: raise maxApplications or choose another"
    if observed.deployed is None:
        return f"serving cluster '{assignment.cluster}' does not answer"
    ref = Ref(*resource.key, model.last_version + 1)
    standing = applications(desired, observed, now)
    wanted = capacity.wanted(desired, observed, ref, model)
    found = capacity.no_room(observed, standing, coming(desired, observed), wanted)
    return None if found is None else found.reason


def _key(version: KeyVersionRead) -> Key:
    return version.tenant, version.model


def _model_key(model: ModelRead) -> Key:
    return model.tenant, model.id
