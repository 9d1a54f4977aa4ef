"""Keeps one serving cluster: a reconciler with the ports that its kind of cluster needs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from datetime import datetime
from pathlib import Path

import httpx

from anamorph import errors
from anamorph.wire.admin import KeyVersionRead, ModelRead
from anamorph.wire.credential import bearer
from anamorph.wire.keyservice import AsyncKeyService
from anamorph.wire.states import State
from anamorph_operator.begin import Limits
from anamorph_operator.kubernetes.api import Api
from anamorph_operator.kubernetes.assignment import assign
from anamorph_operator.kubernetes.build import jobs as job_manifests
from anamorph_operator.kubernetes.build import materialization as manifests
from anamorph_operator.kubernetes.build.materialization import Making
from anamorph_operator.kubernetes.build.pods import owned
from anamorph_operator.kubernetes.build.ray_service import ray_service
from anamorph_operator.kubernetes.build.serve_config import cache, dashboard_url, serve_config
from anamorph_operator.kubernetes.catalogue import Object
from anamorph_operator.kubernetes.jobs import KubernetesJobs, Materialization
from anamorph_operator.kubernetes.resources.definition import SERVING_CLUSTER
from anamorph_operator.kubernetes.resources.objects import ServingCluster
from anamorph_operator.kubernetes.resources.part import GROUP, VERSION
from anamorph_operator.kubernetes.serve import RayServiceServe
from anamorph_operator.kubernetes.tokens import token_in
from anamorph_operator.kubernetes.view import View
from anamorph_operator.ports import Serve
from anamorph_operator.probe import Prober, Tokens
from anamorph_operator.ray_serve import RayServe
from anamorph_operator.reconciler import Reconciler, Settings
from anamorph_operator.state import Baseline, Ref

_log = logging.getLogger(__name__)
TOKEN_KEY = "auth_token"  # noqa: S105 - the key of the Secret


class ClusterKeeper:
    """Keeps serving clusters, each for as long as it is told to.

    Args:
        connect: what sends requests to Ray and to what it serves; a new one at each call.
    """

    def __init__(
        self,
        view: View,
        api: Api,
        keys: AsyncKeyService,
        now: Callable[[], datetime],
        connect: Callable[[], httpx.AsyncBaseTransport],
    ) -> None:
        self._view = view
        self._api = api
        self._keys = keys
        self._now = now
        self._connect = connect

    async def keep(self, cluster: ServingCluster, stop: asyncio.Event) -> None:
        """Turn after turn until ``stop``; the cluster's spec stays as it is given."""
        async with AsyncExitStack() as stack:
            ray = await stack.enter_async_context(self._dashboard(cluster))
            engines = await stack.enter_async_context(
                httpx.AsyncClient(timeout=120, transport=self._connect())
            )
            prober = Prober(engines, Tokens(self._keys.inference_token, self._now), self._now)
            reconciler = Reconciler(
                self._settings(cluster),
                self._keys,
                await self._serve(cluster, RayServe(ray, self._view.serve_url(cluster))),
                self._jobs(cluster),
                prober,
                self._now,
                lambda models, versions: self._select(cluster, models, versions),
                self._view.waking(cluster.name),
            )
            self._view.reconcilers[cluster.name] = reconciler
            try:
                await reconciler.run(stop)
            finally:
                del self._view.reconcilers[cluster.name]
                self._view.wakes.pop(cluster.name, None)

    def _dashboard(self, cluster: ServingCluster) -> httpx.AsyncClient:
        url = dashboard_url(cluster.name, cluster.spec, self._view.site.compute)
        file = _token_file(cluster, self._view.site.options.ray_tokens)
        remedy = "mount the cluster's tokenSecret into the operator"
        auth = bearer(None if file is None else token_in(file, remedy))
        return httpx.AsyncClient(base_url=url, auth=auth, transport=self._connect(), timeout=30)

    async def _serve(self, cluster: ServingCluster, ray: RayServe) -> Serve:
        if cluster.spec.ray is None:
            return ray
        compute = self._view.site.compute
        serve = RayServiceServe(
            self._api,
            ray,
            compute.namespace,
            cluster.name,
            lambda applications: serve_config(cluster.spec, compute, applications),
            lambda config: owned(ray_service(cluster.name, cluster.spec, compute, config), _owner(cluster)),
        )
        # Whatever it fails by, the next write of the list repeats it, and says so.
        with suppress(errors.AnamorphError):
            await serve.renew()
        return serve

    def _jobs(self, cluster: ServingCluster) -> KubernetesJobs:
        settings = self._view.site.materializer(cluster.spec.storage)

        async def build(ref: Ref, model: ModelRead) -> Materialization:
            making = Making(ref, model)
            mounted = [manifests.config_map(settings, making)]
            if settings.parts == 1:
                stages = [job_manifests.whole(settings, making)]
            else:
                mounted.append(job_manifests.claim(settings, making))
                stages = [job_manifests.fold(settings, making), job_manifests.finish(settings, making)]
            account = manifests.service_account(settings, ref.tenant)
            return Materialization(account, tuple(mounted), tuple(stages))

        return KubernetesJobs(self._api, settings.namespace, cluster.name, build, manifests.ref_of)

    def _settings(self, cluster: ServingCluster) -> Settings:
        options, spec = self._view.site.options, cluster.spec
        return Settings(
            serve_url=self._view.serve_url(cluster),
            public_url=self._view.public_url(cluster),
            store=spec.storage.uri,
            baselines=tuple(
                Baseline(one.model, one.uri, one.context_length, one.engine, one.dtype)
                for one in spec.baselines
            ),
            allow_base=options.allow_base,
            interval_s=options.interval_s,
            otlp_endpoint=options.otlp_endpoint,
            pools={pool.name: pool.model_dump(exclude={"name"}) for pool in spec.pools},
            cache=cache(spec),
            limits=Limits(parallel_jobs=options.parallel_jobs, nodes_change=True),
        )

    def _select(
        self,
        cluster: ServingCluster,
        models: tuple[ModelRead, ...],
        versions: tuple[KeyVersionRead, ...],
    ) -> tuple[tuple[ModelRead, ...], tuple[KeyVersionRead, ...]]:
        """The cluster's own, and what nobody wants any more but is due to be destroyed in its storage."""
        view = self._view
        assignment = assign(cluster, view.resources(), versions, view.places())
        view.assignments[cluster.name] = assignment
        chosen, kept = assignment.select(models, versions)
        left = tuple(
            version
            for version in versions
            if (version.tenant, version.model) not in assignment.resources
            and version.state is State.DESTROY_SCHEDULED
            and self._disposes(cluster, version)
        )
        of = {(version.tenant, version.model) for version in left}
        return chosen + tuple(model for model in models if (model.tenant, model.id) in of), kept + left

    def _disposes(self, cluster: ServingCluster, version: KeyVersionRead) -> bool:
        """Whether it is this cluster that removes a replica: the first of those that share a storage."""
        clusters = [seen.of for seen in self._view.clusters() if isinstance(seen.of, ServingCluster)]
        if version.artifact is not None:
            place = version.artifact.replica
            clusters = [one for one in clusters if place.startswith(_root(one.spec.storage.uri))]
        return min((one.name for one in clusters), default=None) == cluster.name


def _root(uri: str) -> str:
    """What the URL of every replica in a storage begins with."""
    return (uri if "://" in uri else f"file://{uri}").rstrip("/") + "/"


def _token_file(cluster: ServingCluster, folder: Path) -> Path | None:
    asked = cluster.spec.ray or cluster.spec.existing
    secret = None if asked is None else asked.token_secret
    return None if secret is None else folder / secret / TOKEN_KEY


def _owner(cluster: ServingCluster) -> Object:
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": SERVING_CLUSTER.name,
        "metadata": {"name": cluster.name, "uid": cluster.metadata.uid},
    }
