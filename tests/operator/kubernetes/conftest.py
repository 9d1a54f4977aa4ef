"""A real API server that knows our custom resources and the admission policy."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client
from tests.keysvc.conftest import Clock, World, close_world, open_world
from tests.keysvc.databases import SqliteFiles
from tests.operator.kubernetes.objects import encrypted_model
from tests.operator.kubernetes.scene import Scene, until
from tests.servers.kube import ApiServer, running_apiserver

from anamorph.wire.admin import TenantCreate
from anamorph_keysvc.homes import Home, init
from anamorph_keysvc.service import tenants
from anamorph_operator.kubernetes.resources.admission import TENANTS, binding, policy
from anamorph_operator.kubernetes.resources.definition import ENCRYPTED_MODEL, KINDS, Kind, definition
from anamorph_operator.kubernetes.resources.part import GROUP, VERSION

Object = dict[str, Any]
Serve = Callable[[], None]


@dataclass
class Kubernetes:
    """The API server, as somebody who may do everything."""

    server: ApiServer

    @property
    def objects(self) -> client.CustomObjectsApi:
        return client.CustomObjectsApi(self.server.admin)

    def namespace(self, tenants: str | None = "acme") -> str:
        """A new namespace that is bound to tenants."""
        name = f"team-{uuid.uuid4().hex[:8]}"
        annotations = {} if tenants is None else {TENANTS: tenants}
        client.CoreV1Api(self.server.admin).create_namespace(
            {"metadata": {"name": name, "annotations": annotations}}
        )
        return name

    def create(self, kind: Kind, namespace: str, body: Object) -> Object:
        """Create an object, unknown fields refused as ``kubectl`` does.

        Raises:
            ApiException: it is refused.
        """
        answer = self.objects.create_namespaced_custom_object(
            GROUP, VERSION, namespace, kind.plural, deepcopy(body), field_validation="Strict"
        )
        return dict(answer)

    def replace(self, kind: Kind, namespace: str, body: Object) -> Object:
        """Write an object anew, with the version that it was read at.

        Raises:
            ApiException: it is refused.
        """
        name = body["metadata"]["name"]
        answer = self.objects.replace_namespaced_custom_object(
            GROUP, VERSION, namespace, kind.plural, name, body, field_validation="Strict"
        )
        return dict(answer)


@pytest.fixture(scope="module")
def kubernetes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubernetes]:
    with running_apiserver(tmp_path_factory.mktemp("kubernetes")) as server:
        made = Kubernetes(server)
        define(made)
        yield made


def define(kubernetes: Kubernetes) -> None:
    """Our resources and the admission policy; they are in force when it returns."""
    admin = kubernetes.server.admin
    extensions = client.ApiextensionsV1Api(admin)
    for kind in KINDS:
        extensions.create_custom_resource_definition(definition(kind))
    admission = client.AdmissionregistrationV1Api(admin)
    admission.create_validating_admission_policy(policy())
    admission.create_validating_admission_policy_binding(binding())
    _await_policy(kubernetes)


def _await_policy(kubernetes: Kubernetes) -> None:
    """Definitions and policies come into force a moment after they are written."""
    namespace, end = kubernetes.namespace("nobody"), time.monotonic() + 60
    while time.monotonic() < end:
        try:
            kubernetes.create(ENCRYPTED_MODEL, namespace, encrypted_model(f"m{uuid.uuid4().hex[:8]}"))
        except client.ApiException as error:
            if "is not bound to tenant" in str(error.body):
                return
        time.sleep(0.1)
    raise RuntimeError("the admission policy did not come into force")


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
