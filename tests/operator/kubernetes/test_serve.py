"""A RayService's applications: read from a dashboard, written to a real API server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from kubernetes import client as kubernetes_client
from tests.operator.kubernetes.conftest import Kubernetes
from tests.servers.kubeconfig import write_kubeconfig

from anamorph import errors
from anamorph.wire.serving import DoorState
from anamorph_operator.kubernetes.api import Api, Client, configuration
from anamorph_operator.kubernetes.catalogue import RAY_SERVICES
from anamorph_operator.kubernetes.serve import RayServiceServe
from anamorph_operator.ray_serve import RayServe
from anamorph_operator.state import Application

pytestmark = pytest.mark.real

DOOR = Application("door", "/", None, DoorState())


@pytest.fixture(scope="module")
def ray_kinds(kubernetes: Kubernetes) -> None:
    """RayService as KubeRay defines it, as far as it matters here."""
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    spec = {
        "type": "object",
        "properties": {"serveConfigV2": {"type": "string"}, "rayClusterConfig": anything},
    }
    schema = {"type": "object", "properties": {"spec": spec, "status": anything}}
    version = {
        "name": "v1",
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
        "subresources": {"status": {}},
    }
    names = {"kind": "RayService", "plural": "rayservices", "singular": "rayservice"}
    extensions = kubernetes_client.ApiextensionsV1Api(kubernetes.server.admin)
    extensions.create_custom_resource_definition(
        {
            "metadata": {
                "name": "rayservices.ray.io",
                "annotations": {"api-approved.kubernetes.io": "unapproved"},
            },
            "spec": {"group": "ray.io", "names": names, "scope": "Namespaced", "versions": [version]},
        }
    )


class Site:
    def __init__(self, kubernetes: Kubernetes, client: Client) -> None:
        self.client = client
        self.namespace = kubernetes.namespace()
        self.status = 503
        self.ray = httpx.AsyncClient(base_url="http://ray", transport=httpx.MockTransport(self.answer))
        dashboard = RayServe(self.ray, "http://127.0.0.1:8000")
        self.serve = RayServiceServe(Api(client), dashboard, self.namespace, "main", config, self.service)
        self.head = "4Gi"

    def answer(self, _request: httpx.Request) -> httpx.Response:
        return httpx.Response(self.status, json={"applications": {}})

    def service(self, config: str) -> dict[str, Any]:
        return {
            "apiVersion": "ray.io/v1",
            "kind": "RayService",
            "metadata": {"name": "main", "namespace": self.namespace},
            "spec": {"serveConfigV2": config, "rayClusterConfig": {"head": self.head}},
        }

    def read(self) -> dict[str, Any]:
        return self.client.get(RAY_SERVICES, self.namespace, "main")


def config(applications: tuple[Application, ...]) -> str:
    return ",".join(application.name for application in applications)


@pytest.fixture
def client(kubernetes: Kubernetes, tmp_path: Path) -> Iterator[Client]:
    made = Client(configuration(write_kubeconfig(kubernetes.server, tmp_path / "config")))
    yield made
    made.close()


@pytest.fixture
async def site(kubernetes: Kubernetes, ray_kinds: None, client: Client) -> AsyncIterator[Site]:  # noqa: ARG001
    made = Site(kubernetes, client)
    yield made
    await made.ray.aclose()


async def test_where_there_is_no_ray_service_nothing_stands(site: Site) -> None:
    """So the plan writes the door, and with it the object; from then on Ray must answer."""
    assert await site.serve.read() == {}
    await site.serve.write((DOOR,))
    with pytest.raises(errors.Unavailable, match="Ray's dashboard"):
        await site.serve.read()
    site.status = 200
    assert await site.serve.read() == {}


async def test_the_object_is_written_whole(site: Site) -> None:
    await site.serve.write((DOOR,))
    site.head = "8Gi"
    await site.serve.write(())
    assert site.read()["spec"] == {"serveConfigV2": "", "rayClusterConfig": {"head": "8Gi"}}


async def test_the_rest_of_the_object_changes_without_the_list(site: Site) -> None:
    await site.serve.renew()
    assert await site.serve.read() == {}  # nothing was there, and nothing was made
    await site.serve.write((DOOR,))
    site.head = "8Gi"
    await site.serve.renew()
    assert site.read()["spec"] == {"serveConfigV2": "door", "rayClusterConfig": {"head": "8Gi"}}


async def test_the_same_list_changes_nothing(site: Site) -> None:
    await site.serve.write((DOOR,))
    before = site.read()["metadata"]["resourceVersion"]
    await site.serve.write((DOOR,))
    assert site.read()["metadata"]["resourceVersion"] == before


async def test_a_list_that_was_overtaken_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever was stopped between looking and writing does not take a successor's applications down."""
    await site.serve.write((DOOR,))
    apply = Api.apply

    async def later(api: Api, body: dict[str, Any], **options: Any) -> dict[str, Any]:
        monkeypatch.setattr(Api, "apply", apply)
        site.head = "8Gi"
        await site.serve.write((DOOR, DOOR))
        return await apply(api, body, **options)

    monkeypatch.setattr(Api, "apply", later)
    with pytest.raises(errors.Conflict):
        await site.serve.write(())
    assert site.read()["spec"]["serveConfigV2"] == "door,door"
