"""A scene for tests of the whole driver: Ray as it answers, a tenant's namespace, the operator."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from kubernetes import client as kubernetes_client
from tests.keysvc.conftest import ARTIFACT, World
from tests.operator.kubernetes.objects import ABSENT, encrypted_model, serving_cluster
from tests.servers.kubeconfig import write_kubeconfig

from anamorph.wire.admin import Role
from anamorph.wire.inference import KEY_ID_HEADER
from anamorph.wire.keyservice import AsyncKeyService
from anamorph.wire.serving import Usage
from anamorph.wire.states import State
from anamorph_keysvc.service import materialization, preparation
from anamorph_operator.kubernetes.api import Api, Client, configuration, connection
from anamorph_operator.kubernetes.build.ray_group import Compute
from anamorph_operator.kubernetes.handlers import operate
from anamorph_operator.kubernetes.options import Options, Site
from anamorph_operator.kubernetes.process import Driver
from anamorph_operator.kubernetes.resources.definition import ENCRYPTED_MODEL, SERVING_CLUSTER
from anamorph_operator.kubernetes.resources.part import GROUP, VERSION

if TYPE_CHECKING:
    from tests.operator.kubernetes.conftest import Kubernetes

Object = dict[str, Any]
SERVE = "http://serve:8000"
EXISTING = {"ray": ABSENT, "existing.dashboardUrl": "http://ray:8265", "existing.serveUrl": SERVE}


class Ray:
    """Ray's dashboard, and what it serves: all that is written runs and answers what is expected."""

    def __init__(self) -> None:
        self.written: list[Object] = []
        self.sticky = False

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path.endswith("/usage"):
            return httpx.Response(200, json=Usage(source="p", tokens=0).model_dump())
        if path.endswith("/v1/completions"):
            key_id = request.headers[KEY_ID_HEADER]
            return httpx.Response(200, headers={KEY_ID_HEADER: key_id}, json=self.completion(key_id))
        if request.method == "PUT":
            left = [one for one in self.written if one["name"] != "door"] if self.sticky else []
            written = json.loads(request.content)["applications"]
            self.written = written + [one for one in left if one["name"] not in {w["name"] for w in written}]
        elif "nodes" in path:
            return httpx.Response(503)
        running = {one["name"]: {"status": "RUNNING", "deployed_app_config": one} for one in self.written}
        return httpx.Response(200, json={"applications": running})

    @staticmethod
    def completion(key_id: str) -> Object:
        [expected] = ARTIFACT.probe.expected
        choice = {"index": 0, "text": "", "token_ids": list(expected), "finish_reason": "length"}
        whole = {"id": "c", "created": 0, "model": "m", "system_fingerprint": key_id}
        return {**whole, "choices": [choice]}

    @property
    def names(self) -> list[str]:
        return [one["name"] for one in self.written]


class Scene:
    """A tenant's namespace, the operator's two, and the operator itself."""

    def __init__(self, kubernetes: Kubernetes, world: World, folder: Path) -> None:
        self.kubernetes, self.world = kubernetes, world
        self.rays: defaultdict[str, Ray] = defaultdict(Ray)  # by the host of the dashboard
        self.team = kubernetes.namespace("acme")
        self.jobs, self.compute = kubernetes.namespace(None), kubernetes.namespace(None)
        self.batch = kubernetes_client.BatchV1Api(kubernetes.server.admin)
        self.core = kubernetes_client.CoreV1Api(kubernetes.server.admin)
        self.calls: Counter[str] = Counter()
        self.settings = configuration(write_kubeconfig(kubernetes.server, folder / "config"))
        self.client = Client(
            self.settings, count=lambda verb, of, _: self.calls.update([f"{verb} {of.plural}"])
        )
        self.keys = AsyncKeyService("http://keysvc", world.secret(Role.PLATFORM), transport=world.transport())
        options = Options(
            namespace=self.jobs,
            jobs_namespace=self.jobs,
            compute_namespace=self.compute,
            keysvc="http://keysvc",
            keysvc_token_file=folder / "token",
            ray_tokens=folder,
            allow_base=("s3://bases",),
            interval_s=0.3,
            materializer={"image": "registry.example/materializer:0.1"},
        )
        self.driver = Driver(
            Site(options, Compute(self.compute)),
            Api(self.client),
            self.keys,
            lambda: datetime.now(UTC),
            lambda: httpx.MockTransport(lambda request: self.rays[request.url.host](request)),
        )
        self.stop = threading.Event()

    @property
    def ray(self) -> Ray:
        """The cluster ``main``."""
        return self.rays["ray"]

    async def operate(self) -> None:
        await operate(self.driver, lambda: connection(self.settings), self.stop)
        await self.keys.close()
        # aiohttp, by which kopf watches, ends its TLS connections a moment after it has been told to.
        await asyncio.sleep(0.5)

    def model(self, name: str = "chat", **changes: Any) -> None:
        self.kubernetes.create(ENCRYPTED_MODEL, self.team, encrypted_model(name, **changes))

    def cluster(self, name: str = "main", **changes: str) -> None:
        body = serving_cluster(name, **EXISTING | changes)
        self.kubernetes.create(SERVING_CLUSTER, self.compute, body)

    def change(self, spec: Object, name: str = "chat") -> None:
        """Edit a resource, as ``kubectl patch --type merge`` does."""
        at = (GROUP, VERSION, self.team, ENCRYPTED_MODEL.plural, name)
        self.kubernetes.objects.patch_namespaced_custom_object(*at, {"spec": spec})

    def readdress(self, url: str) -> None:
        """Where clients are to reach the cluster from now on."""
        self.kubernetes.objects.patch_namespaced_custom_object(
            GROUP, VERSION, self.compute, SERVING_CLUSTER.plural, "main", {"spec": {"publicUrl": url}}
        )

    def read(self, name: str = "chat") -> Object:
        found = self.kubernetes.objects.get_namespaced_custom_object(
            GROUP, VERSION, self.team, ENCRYPTED_MODEL.plural, name
        )
        return dict(found)

    def models(self) -> list[str]:
        found = self.kubernetes.objects.list_namespaced_custom_object(
            GROUP, VERSION, self.team, ENCRYPTED_MODEL.plural
        )
        return [one["metadata"]["name"] for one in found["items"]]

    def annotate(self, key: str, text: str, name: str = "chat") -> None:
        self.kubernetes.objects.patch_namespaced_custom_object(
            GROUP,
            VERSION,
            self.team,
            ENCRYPTED_MODEL.plural,
            name,
            {"metadata": {"annotations": {key: text}}},
        )

    def delete(self, name: str = "chat") -> None:
        self.kubernetes.objects.delete_namespaced_custom_object(
            GROUP, VERSION, self.team, ENCRYPTED_MODEL.plural, name
        )

    def condition(self, kind: str, name: str = "chat") -> tuple[str, str] | None:
        found = self.read(name).get("status", {}).get("conditions", [])
        return next(((one["status"], one["reason"]) for one in found if one["type"] == kind), None)

    def clear(self) -> None:
        """Take everything away, for the next operator sees every namespace, and the oldest resource owns."""
        at = (GROUP, VERSION, self.team, ENCRYPTED_MODEL.plural)
        for name in self.models():
            loose = {"metadata": {"finalizers": None}}
            self.kubernetes.objects.patch_namespaced_custom_object(*at, name, loose)
        self.kubernetes.objects.delete_collection_namespaced_custom_object(*at)

    def materialise(self, version: int) -> None:
        """What a job does."""
        at = ("acme", "chat", version)
        holder = self.world.holder(self.world.grant(version))
        self.world.release_to_job(holder, *at)
        self.world.do(materialization.stage, holder, *at, ARTIFACT)

    def state(self, version: int) -> State | None:
        found = self.world.sql("SELECT state FROM key_version WHERE model = 'chat' AND version = ?", version)
        return State(found[0][0]) if found else None

    def prepared(self, version: int) -> bool:
        preparation.prepare_due(self.world.service)
        found = self.world.sql("SELECT key_id FROM key_version WHERE model = 'chat' AND version = ?", version)
        return bool(found and found[0][0])

    def collect(self) -> None:
        """What Kubernetes' garbage collector does: Jobs that are deleted end, once their pods are gone."""
        for job in self.batch.list_namespaced_job(self.jobs).items:
            if job.metadata.deletion_timestamp is not None:
                loose = {"metadata": {"finalizers": None}}
                self.batch.patch_namespaced_job(job.metadata.name, self.jobs, loose)

    def order(self, version: int) -> Object | None:
        """What the Job of a version is told."""
        self.collect()
        found = self.core.list_namespaced_config_map(self.jobs).items
        orders = (json.loads(text) for one in found for text in one.data.values() if text.startswith("{"))
        return next((order for order in orders if order.get("version") == version), None)

    def job_count(self) -> int:
        return len(self.batch.list_namespaced_job(self.jobs).items)


def until(true: Callable[[], bool], what: str = "") -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, f"it did not come true: {what}"
        time.sleep(0.1)
