"""Keeps every ``EncryptedModel``: what it wants into the key service, how it stands into its status.

One loop for all of them, beside the clusters' own: it reads the key service once a turn, and writes nothing
where nothing has changed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from traceback import format_tb

from anamorph import errors
from anamorph.wire.admin import KeyVersionRead, ModelRead
from anamorph.wire.keyservice import AsyncKeyService
from anamorph_operator import listing
from anamorph_operator.actions import Apply
from anamorph_operator.kubernetes.api import Api
from anamorph_operator.kubernetes.assignment import Key, no_room_for, owners, place
from anamorph_operator.kubernetes.carry import carry
from anamorph_operator.kubernetes.conditions import Known
from anamorph_operator.kubernetes.intent import steps
from anamorph_operator.kubernetes.records import mismatch
from anamorph_operator.kubernetes.resources.admission import TENANTS
from anamorph_operator.kubernetes.resources.definition import ENCRYPTED_MODEL, SERVING_CLUSTER
from anamorph_operator.kubernetes.resources.objects import EncryptedModel, ServingCluster
from anamorph_operator.kubernetes.resources.part import Part
from anamorph_operator.kubernetes.status import cluster_status, differs, model_status
from anamorph_operator.kubernetes.trouble import Problem, of_key_service
from anamorph_operator.kubernetes.view import View, Watched, status_of
from anamorph_operator.state import Observed

_log = logging.getLogger(__name__)
# How long something that seldom changes is believed: a version that has ended.
_KEPT = timedelta(seconds=30)


@dataclass(frozen=True)
class Records:
    """What the key service says; ``away`` is why it says nothing."""

    models: Mapping[Key, ModelRead]
    versions: Mapping[Key, tuple[KeyVersionRead, ...]]
    away: str | None = None


class ModelKeeper:
    """One turn for all resources."""

    def __init__(
        self,
        view: View,
        api: Api,
        keys: AsyncKeyService,
        now: Callable[[], datetime],
    ) -> None:
        self._view = view
        self._api = api
        self._keys = keys
        self._now = now
        self._ended: dict[tuple[Key, int], tuple[datetime, KeyVersionRead]] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Turn after turn until ``stop``."""
        wake = self._view.waking("")
        while not stop.is_set():
            try:
                await self.turn()
            except Exception as error:  # noqa: BLE001 - the loop must outlive a bug in one turn
                # Without its text: an unforeseen exception may quote anything.
                trace = "".join(format_tb(error.__traceback__))
                _log.error("this turn of the models failed: %s\n%s", type(error).__name__, trace)
            with suppress(TimeoutError):
                await asyncio.wait_for(wake.wait(), self._view.site.options.interval_s)
            wake.clear()

    async def turn(self) -> None:
        """Look, ask for what is missing, and say how things stand."""
        records = await self._records()
        owning = owners(self._view.resources())
        for seen in self._view.models():
            if isinstance(seen.of, EncryptedModel) and not seen.of.metadata.deleting:
                await self._keep(seen, seen.of, owning[seen.of.key], records)
        for seen in self._view.clusters():
            if isinstance(seen.of, ServingCluster):
                await self._say_cluster(seen, seen.of)

    async def _records(self) -> Records:
        try:
            models = await listing.all_models(self._keys)
            versions = await listing.current_versions(self._keys)
            found: dict[Key, tuple[KeyVersionRead, ...]] = {}
            for version in versions:
                key = (version.tenant, version.model)
                found[key] = (*found.get(key, ()), version)
            by_key = {(model.tenant, model.id): model for model in models}
            for key in owners(self._view.resources()).keys() & by_key.keys():
                found[key] = await self._with_newest(by_key[key], found.get(key, ()))
        except errors.ServiceError as error:
            return Records({}, {}, str(error))
        return Records(by_key, found)

    async def _with_newest(
        self, model: ModelRead, versions: tuple[KeyVersionRead, ...]
    ) -> tuple[KeyVersionRead, ...]:
        """The newest version is needed even if it has ended, and is then not listed."""
        last = model.last_version
        if last == 0 or any(version.version == last for version in versions):
            return versions
        place = ((model.tenant, model.id), last)
        seen = self._ended.get(place)
        if seen is None or self._now() >= seen[0] + _KEPT:
            found = await self._keys.get_version(model.tenant, model.id, last)
            seen = self._ended[place] = (self._now(), found)
        return (*versions, seen[1])

    async def _keep(
        self, seen: Watched, resource: EncryptedModel, owner: EncryptedModel, records: Records
    ) -> None:
        record, versions = records.models.get(resource.key), records.versions.get(resource.key, ())
        troubles = self._troubles(resource, owner, records)
        if not troubles.keys() & _UNASKED:
            troubles |= self._held(resource, record)
            troubles |= await self._ask(resource, record, versions, may_move=Problem.NO_ROOM not in troubles)
        if Problem.DUPLICATE in troubles:
            record, versions = None, ()  # they are the owner's to show
        known = Known(record, versions, self._observed(resource, versions), troubles)
        status = model_status(resource, known, self._view.places(), self._now())
        await self._write(seen, ENCRYPTED_MODEL.name, resource.status, status)

    def _troubles(
        self, resource: EncryptedModel, owner: EncryptedModel, records: Records
    ) -> dict[Problem, str]:
        """What speaks against asking for it at all."""
        found: dict[Problem, str] = {}
        record = records.models.get(resource.key)
        if owner is not resource:
            other = f"{owner.metadata.namespace}/{owner.metadata.name}"
            found[Problem.DUPLICATE] = f"EncryptedModel {other} names the same model: delete one of them"
        if records.away is not None:
            found[Problem.KEY_SERVICE_AWAY] = records.away
        if record is not None and (differs := mismatch(resource, record)) is not None:
            found[Problem.RECORD_DIFFERS] = differs
        return found | self._unbound(resource) | self._nowhere(resource)

    def _unbound(self, resource: EncryptedModel) -> dict[Problem, str]:
        namespace = resource.metadata.namespace
        if self._view.bound(resource):
            return {}
        return {
            Problem.NAMESPACE_NOT_BOUND: f"namespace {namespace} is not bound to tenant {resource.tenant}: "
            f"a cluster admin adds it to the annotation {TENANTS} of the namespace"
        }

    def _nowhere(self, resource: EncryptedModel) -> dict[Problem, str]:
        name = resource.spec.serving_cluster
        if name not in self._view.places():
            namespace = self._view.site.options.compute_namespace
            return {Problem.CLUSTER_UNKNOWN: f"there is no ServingCluster {name} in namespace {namespace}"}
        assignment = self._view.assignments.get(name)
        if assignment is not None and resource.key in assignment.full:
            why = f"serving cluster {name} is full: raise its maxApplications or choose another"
            return {Problem.CLUSTER_FULL: why}
        return {}

    def _held(self, resource: EncryptedModel, record: ModelRead | None) -> dict[Problem, str]:
        """Why it waits, or may not move to where it wants to be."""
        held = self._view.held().get(resource.key)
        if held is not None:
            return {Problem.NO_ROOM: held}
        name = resource.spec.serving_cluster
        lies_elsewhere = any(one.serving_cluster != name for one in resource.status.versions[:1])
        if record is None or not lies_elsewhere:
            return {}
        assignment, turn = self._view.assignments.get(name), self._view.turn(name)
        if assignment is None or turn is None:
            return {Problem.NO_ROOM: f"serving cluster {name} has not been looked at yet"}
        why = no_room_for(assignment, resource, record, turn.desired, turn.observed, self._now())
        return {} if why is None else {Problem.NO_ROOM: why}

    async def _ask(
        self,
        resource: EncryptedModel,
        record: ModelRead | None,
        versions: Sequence[KeyVersionRead],
        *,
        may_move: bool,
    ) -> dict[Problem, str]:
        """Carry out what the key service lacks; what it refuses is said in the status."""
        lies = {v.version: place(resource, v, self._view.places()) for v in versions}
        for step in steps(resource, record, versions, lies, may_move=may_move):
            try:
                await carry(self._keys, step)
            except errors.AnamorphError as error:
                return of_key_service(error)
            _log.info("%s of %s for %s", type(step).__name__, "/".join(resource.key), _name(resource))
            self._view.wake()
        return {}

    def _observed(self, resource: EncryptedModel, versions: Sequence[KeyVersionRead]) -> Observed | None:
        """What stands on the cluster of the active version, or of the newest."""
        known = Known(versions=tuple(versions))
        version = known.active or known.newest
        name = resource.spec.serving_cluster
        if version is not None:
            name = place(resource, version, self._view.places())
        turn = self._view.turn(name)
        return None if turn is None else turn.observed

    async def _say_cluster(self, seen: Watched, cluster: ServingCluster) -> None:
        assignment, turn = self._view.assignments.get(cluster.name), self._view.turn(cluster.name)
        if assignment is None:
            return
        urls = (self._view.serve_url(cluster), self._view.public_url(cluster))
        refused = [why for action, why in turn.failed if isinstance(action, Apply)] if turn else []
        observed = None if turn is None else turn.observed
        status = cluster_status(
            cluster, assignment, observed, urls, self._now(), refused[0] if refused else None
        )
        await self._write(seen, SERVING_CLUSTER.name, cluster.status, status)

    async def _write(self, seen: Watched, kind: str, old: Part, new: Part) -> None:
        if not differs(old, new):
            return
        try:
            await self._api.apply(status_of(seen, kind, new), force=True, part="status")
        except (errors.Conflict, errors.NotFound):
            return  # it has changed or gone, which comes to us, too
        except errors.AnamorphError as error:
            _log.warning("the status of %s was not written: %s", _name(seen.of), error)


def _name(resource: EncryptedModel | ServingCluster) -> str:
    return f"{resource.metadata.namespace}/{resource.metadata.name}"


_UNASKED = frozenset(
    {
        Problem.DUPLICATE,
        Problem.KEY_SERVICE_AWAY,
        Problem.RECORD_DIFFERS,
        Problem.NAMESPACE_NOT_BOUND,
        Problem.CLUSTER_UNKNOWN,
        Problem.CLUSTER_FULL,
    }
)
