"""What kopf does for us: it watches, keeps indices and finalizers, and runs a task for each cluster.

It decides nothing.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

import kopf

from anamorph import errors
from anamorph_operator.kubernetes.api import Connection
from anamorph_operator.kubernetes.process import Driver
from anamorph_operator.kubernetes.removal import forced
from anamorph_operator.kubernetes.resources.definition import ENCRYPTED_MODEL, SERVING_CLUSTER
from anamorph_operator.kubernetes.resources.objects import EncryptedModel, ServingCluster
from anamorph_operator.kubernetes.resources.part import GROUP, VERSION
from anamorph_operator.kubernetes.view import Watched

_log = logging.getLogger(__name__)
FINALIZER = f"{GROUP}/replicas"
_MODELS = (GROUP, VERSION, ENCRYPTED_MODEL.plural)
_CLUSTERS = (GROUP, VERSION, SERVING_CLUSTER.plural)
_NAMESPACES = ("", "v1", "namespaces")
# Seconds: between two looks at a deletion, after a failure, for a cluster's turn to end.
_LOOK_S, _AGAIN_S, _END_S = 3, 10, 10

Index = kopf.Index[tuple[str, str], Watched]


class NothingKept(kopf.DiffBaseStorage):
    """Keeps no copy of an object in the object: we compare with what stands, never with what was."""

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:  # noqa: ARG002
        """Nothing."""
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        """Nothing."""


def settings() -> kopf.OperatorSettings:
    """How kopf is to behave."""
    made = kopf.OperatorSettings()
    made.peering.standalone = True  # the lease is held before it starts
    made.scanning.disabled = True  # no watch of definitions and namespaces: it would need their rights
    made.persistence.finalizer = FINALIZER
    # Only where a deletion waits: nothing else has progress.
    made.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=GROUP, v1=False)
    made.persistence.diffbase_storage = NothingKept()
    made.posting.reporting_component = "anamorph-operator"
    made.posting.event_name_prefix = "anamorph-"
    made.watching.server_timeout = 300
    made.watching.connect_timeout = 10
    made.networking.request_timeout = 30
    made.networking.connect_timeout = 10
    made.execution.default_backoff = _AGAIN_S
    made.process.ultimate_exiting_timeout = 60
    return made


class Handlers:
    """Hands what kopf sees to those who decide.

    Args:
        connect: how to reach the API server, asked again whenever it refuses our token.
    """

    def __init__(self, driver: Driver, connect: Callable[[], Connection]) -> None:
        self._view = driver.view
        self._clusters = driver.clusters
        self._models = driver.models
        self._remover = driver.remover
        self._now = driver.now
        self._connect = connect
        self._seen: dict[str, object] = {}
        self._changed: dict[str, asyncio.Event] = {}
        self._stop = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    def registry(self) -> kopf.OperatorRegistry:
        """Every handler, registered."""
        made = kopf.OperatorRegistry()
        kopf.on.login(registry=made)(self.login)
        kopf.on.cleanup(registry=made)(self.end)
        kopf.index(*_MODELS, id="models", registry=made)(self.index_model)
        kopf.index(*_CLUSTERS, id="clusters", when=self._ours, registry=made)(self.index_cluster)
        kopf.index(*_NAMESPACES, id="namespaces", registry=made)(self.index_namespace)
        kopf.on.event(*_MODELS, registry=made)(self.seen)
        kopf.on.event(*_CLUSTERS, when=self._ours, registry=made)(self.seen)
        kopf.on.delete(*_MODELS, registry=made)(self.deleted)
        kopf.daemon(
            *_CLUSTERS,
            when=self._ours,
            registry=made,
            cancellation_backoff=_END_S,
            cancellation_timeout=_END_S,
        )(self.keep)
        return made

    def _ours(self, namespace: str | None, **_: Any) -> bool:
        return namespace == self._view.site.options.compute_namespace

    async def login(self, **_: Any) -> kopf.ConnectionInfo:
        """As the API client is configured."""
        given = await asyncio.to_thread(self._connect)
        return kopf.ConnectionInfo(
            server=given.server,
            ca_path=given.ca_file,
            scheme="Bearer",
            token=given.token,
            certificate_path=given.certificate_file,
            private_key_path=given.key_file,
        )

    async def index_model(self, body: kopf.Body, **_: Any) -> Mapping[tuple[str, str], Watched] | None:
        """Every resource, as a typed value."""
        return _indexed(EncryptedModel.read, body)

    async def index_cluster(self, body: kopf.Body, **_: Any) -> Mapping[tuple[str, str], Watched] | None:
        """Every cluster of the compute namespace, as a typed value."""
        return _indexed(ServingCluster.read, body)

    async def index_namespace(self, body: kopf.Body, **_: Any) -> Mapping[str, Mapping[str, str]]:
        """Annotations of every namespace: to read each when it is needed would be a call per tenant."""
        return {body["metadata"]["name"]: dict(body["metadata"].get("annotations") or {})}

    async def seen(self, body: kopf.Body, **indices: Any) -> None:
        """Wake whoever keeps it, if it has changed by somebody else's hand."""
        self._begin(indices)
        meta, uid = body["metadata"], body["metadata"]["uid"]
        now = (meta.get("generation"), meta.get("annotations"), meta.get("deletionTimestamp"))
        if self._seen.get(uid) == now:
            return
        self._seen[uid] = now
        if body["kind"] == SERVING_CLUSTER.name and meta["name"] in self._changed:
            self._changed[meta["name"]].set()
        self._view.wake()

    def _begin(self, indices: Mapping[str, Any]) -> None:
        """From the first event on all indices are complete; before, nothing may be concluded from them."""
        if self._loop is None:
            self._view.models = lambda: list(_values(indices["models"]))
            self._view.clusters = lambda: list(_values(indices["clusters"]))
            self._view.annotations = lambda name: next(iter(indices["namespaces"].get(name, ())), {})
            self._loop = asyncio.create_task(self._models.run(self._stop), name="models")

    async def deleted(self, body: kopf.Body, **_: Any) -> None:
        """Remove a model; again and again until nothing of it is left, or until the deadline."""
        resource = EncryptedModel.read(body)
        deleted_at = datetime.fromisoformat(body["metadata"]["deletionTimestamp"])
        try:
            left = await self._remover.step(resource)
        except errors.AnamorphError as error:
            left = str(error)
        if left is None:
            return
        why = forced(resource, deleted_at, self._now())
        if why is None:
            raise kopf.TemporaryError(left, delay=_LOOK_S)
        kopf.warn(body, reason="DeletionForced", message=f"{why}, and this was left: {left}"[:1000])

    async def keep(self, body: kopf.Body, stopped: Any, **indices: Any) -> None:
        """Keep one cluster as long as it is there; begin anew with every change of its spec."""
        self._begin(indices)
        name = body["metadata"]["name"]
        while not stopped:
            changed = self._changed[name] = asyncio.Event()
            stop = asyncio.Event()
            cluster = ServingCluster.read(body)
            work = asyncio.create_task(self._clusters.keep(cluster, stop), name=f"cluster {name}")
            others = [asyncio.ensure_future(one) for one in (stopped.wait(), changed.wait())]
            await asyncio.wait([work, *others], return_when=asyncio.FIRST_COMPLETED)
            stop.set()
            for one in others:
                one.cancel()
            await work

    async def end(self, **_: Any) -> None:
        """End the loop of the models."""
        self._stop.set()
        self._view.wake()
        if self._loop is not None:
            with suppress(asyncio.CancelledError):
                await self._loop


def _indexed(
    read: Callable[[Mapping[str, Any]], EncryptedModel | ServingCluster], body: kopf.Body
) -> Mapping[tuple[str, str], Watched] | None:
    try:
        found = read(body)
    except errors.SetupError as error:
        _log.error("%s", error)
        return None
    key = (found.metadata.namespace, found.metadata.name)
    return {key: Watched(found, body["metadata"]["resourceVersion"])}


def _values(index: Index) -> Iterable[Watched]:
    return (value for key in list(index) for value in index[key])


async def operate(driver: Driver, connect: Callable[[], Connection], stop: threading.Event) -> None:
    """Watch until SIGTERM, or until ``stop``."""
    registry = Handlers(driver, connect).registry()
    await kopf.operator(registry=registry, settings=settings(), clusterwide=True, stop_flag=stop)
