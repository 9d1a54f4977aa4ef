"""The whole driver: kopf on a real API server, over a real key service; Ray is as it answers its operator."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from kubernetes import client as kubernetes_client
from tests.keysvc.conftest import ARTIFACT, Clock, World, close_world, open_world
from tests.keysvc.databases import SqliteFiles
from tests.operator.kubernetes.conftest import Kubernetes
from tests.operator.kubernetes.kubeconfig import write_kubeconfig
from tests.operator.kubernetes.objects import ABSENT, encrypted_model, serving_cluster

from anamorph.wire.admin import Role, TenantCreate
from anamorph.wire.inference import KEY_ID_HEADER
from anamorph.wire.keyservice import AsyncKeyService
from anamorph.wire.serving import Usage
from anamorph.wire.states import State
from anamorph_keysvc.homes import Home, init
from anamorph_keysvc.scope import PLATFORM
from anamorph_keysvc.service import lookup, materialization, preparation, tenants
from anamorph_operator.kubernetes.api import Api, Client, configuration, connection
from anamorph_operator.kubernetes.build.ray_group import Compute
from anamorph_operator.kubernetes.handlers import FINALIZER, operate
from anamorph_operator.kubernetes.options import Options, Site
from anamorph_operator.kubernetes.process import Driver
from anamorph_operator.kubernetes.resources.admission import TENANTS
from anamorph_operator.kubernetes.resources.definition import ENCRYPTED_MODEL, SERVING_CLUSTER
from anamorph_operator.kubernetes.resources.objects import FORCE_DELETE, ROTATE
from anamorph_operator.kubernetes.resources.part import GROUP, VERSION

pytestmark = pytest.mark.real

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
        self.kubernetes, self.world, self.ray = kubernetes, world, Ray()
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
            lambda: httpx.MockTransport(self.ray),
        )
        self.stop = threading.Event()

    async def operate(self) -> None:
        await operate(self.driver, lambda: connection(self.settings), self.stop)
        await self.keys.close()

    def model(self, name: str = "chat", **changes: Any) -> None:
        self.kubernetes.create(ENCRYPTED_MODEL, self.team, encrypted_model(name, **changes))

    def cluster(self) -> None:
        self.kubernetes.create(SERVING_CLUSTER, self.compute, serving_cluster("main", **EXISTING))

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

    def readdress(self, url: str) -> None:
        self.kubernetes.objects.patch_namespaced_custom_object(
            GROUP, VERSION, self.compute, SERVING_CLUSTER.plural, "main", {"spec": {"publicUrl": url}}
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

    def job_count(self) -> int:
        return len(self.batch.list_namespaced_job(self.jobs).items)


@pytest.fixture
def own_world(tmp_path: Path) -> Iterator[World]:
    home = Home(tmp_path / "home")
    init(home, Clock(), os.urandom)
    world = open_world(SqliteFiles(), home)
    world.do(tenants.create_tenant, TenantCreate(id="acme"))
    yield world
    close_world(world)


@pytest.fixture
def scene(kubernetes: Kubernetes, own_world: World, tmp_path: Path) -> Iterator[Scene]:
    made = Scene(kubernetes, own_world, tmp_path)
    # With an event loop of its own: kopf cancels whatever else runs in its own when it ends.
    operating = threading.Thread(target=lambda: asyncio.run(made.operate()))
    operating.start()
    yield made
    made.stop.set()
    operating.join()
    made.clear()
    made.client.close()


def until(true: Callable[[], bool], what: str = "") -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, f"it did not come true: {what}"
        time.sleep(0.1)


Serve = Callable[[], None]


@pytest.fixture
def serve(scene: Scene) -> Serve:
    """Bring the first version of a model into service."""

    def serve() -> None:
        scene.cluster()
        scene.model()
        until(lambda: scene.prepared(1), "a key")
        until(lambda: scene.job_count() == 1, "a job")
        scene.materialise(1)
        until(lambda: scene.condition("Ready") == ("True", "Ready"), "ready")

    return serve


def test_a_resource_becomes_a_served_model(scene: Scene, serve: Serve) -> None:
    serve()
    assert scene.state(1) is State.ACTIVE
    assert scene.ray.names == ["door", "acme.chat.v1"]
    found = scene.read()
    assert found["metadata"]["finalizers"] == [FINALIZER]
    assert found["status"]["activeVersion"] == 1
    assert found["status"]["endpoint"] == f"{SERVE}/acme/chat/v1"
    assert "annotations" not in found["metadata"]


def test_a_cluster_s_new_address_reaches_what_it_serves(scene: Scene, serve: Serve) -> None:
    """The status and the key service have it, without a rotation and without another write to Ray."""
    serve()
    written = list(scene.ray.written)
    scene.readdress("https://models.example.com/")
    told = "https://models.example.com/acme/chat/v1"
    until(lambda: scene.read()["status"]["endpoint"] == told, "the status")
    with scene.world.service.database.read(PLATFORM) as session:
        assert lookup.version(session, "acme", "chat", 1).endpoint == told
    assert scene.state(2) is None
    assert scene.ray.written == written
    assert scene.condition("Ready") == ("True", "Ready")


def test_an_annotation_rotates_once(scene: Scene, serve: Serve) -> None:
    serve()
    scene.annotate(ROTATE, "because")
    until(lambda: scene.prepared(2), "a second key")
    until(lambda: scene.condition("Rotating") == ("True", "Issuing") or scene.job_count() == 2, "a job")
    scene.materialise(2)
    until(lambda: scene.read()["status"].get("activeVersion") == 2, "the second is active")
    until(lambda: scene.read()["status"].get("rotateRequest") == "because", "answered")
    scene.annotate("unrelated", "text")
    time.sleep(1.5)
    assert scene.state(3) is None


def test_a_settled_model_costs_no_write(scene: Scene, serve: Serve) -> None:
    """And of reads only the Jobs of each cluster."""
    serve()
    time.sleep(2)
    before = scene.read()["metadata"]["resourceVersion"]
    scene.calls.clear()
    time.sleep(4)
    assert scene.read()["metadata"]["resourceVersion"] == before
    assert set(scene.calls) == {"list jobs"}


def test_a_deletion_takes_applications_and_keys_along(scene: Scene, serve: Serve) -> None:
    serve()
    scene.delete()
    until(lambda: scene.models() == [], "gone")
    assert scene.ray.names == ["door"]
    assert scene.state(1) is State.DESTROY_SCHEDULED


def test_a_held_up_deletion_is_ended_by_force_and_says_so(scene: Scene, serve: Serve) -> None:
    serve()
    scene.ray.sticky = True
    scene.delete()
    until(lambda: scene.state(1) is State.DESTROY_SCHEDULED, "revoked")
    time.sleep(2)
    assert scene.models() == ["chat"]
    scene.annotate(FORCE_DELETE, "true")
    until(lambda: scene.models() == [], "gone")

    def said() -> bool:
        events = scene.core.list_namespaced_event(scene.team).items
        return any(one.reason == "DeletionForced" and "acme.chat.v1" in one.message for one in events)

    until(said, "the event")


def test_a_resource_that_must_not_name_its_tenant_gets_nothing(scene: Scene) -> None:
    """Nor does its deletion take anything, and it is not held up: somebody has taken the binding away."""
    scene.cluster()
    scene.core.patch_namespace(scene.team, {"metadata": {"annotations": {TENANTS: "acme,other"}}})
    scene.model()
    until(lambda: scene.prepared(1), "a key")
    scene.core.patch_namespace(scene.team, {"metadata": {"annotations": {TENANTS: "other"}}})
    until(lambda: scene.condition("Degraded") == ("True", "NamespaceNotBound"), "refused")
    scene.delete()
    until(lambda: scene.models() == [], "gone")
    assert scene.state(1) in {State.PENDING, State.MATERIALIZING}
    assert scene.state(2) is None


def test_of_two_resources_for_one_model_the_older_one_counts(scene: Scene, serve: Serve) -> None:
    serve()
    scene.model("other", model="chat")
    until(lambda: scene.condition("Ready", "other") == ("False", "Duplicate"), "told")
    scene.delete("other")
    until(lambda: scene.models() == ["chat"], "gone")
    assert scene.state(1) is State.ACTIVE


def test_a_cluster_that_there_is_not_is_told(scene: Scene) -> None:
    scene.model()
    until(lambda: scene.condition("Ready") is not None, "a status")
    assert scene.state(1) is None
