"""An API server, a key service and Rays, with the operator as a process before them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from benchmarks.objects import records
from benchmarks.objects.ray import Ray
from kubernetes import client
from tests.operator.kubernetes.conftest import Kubernetes, define
from tests.operator.kubernetes.objects import ABSENT, serving_cluster
from tests.servers.asgi import serving
from tests.servers.kube import AUDIT, running_apiserver
from tests.servers.kubeconfig import write_kubeconfig
from tests.servers.process import Program, free_port

from anamorph_operator.kubernetes.resources.admission import TENANTS
from anamorph_operator.kubernetes.resources.definition import ENCRYPTED_MODEL, SERVING_CLUSTER
from anamorph_operator.kubernetes.resources.part import GROUP, VERSION
from anamorph_operator.kubernetes.resources.serving_cluster import MOST_APPLICATIONS

NAMESPACE, JOBS, COMPUTE = "anamorph", "anamorph-jobs", "anamorph-compute"
USER = f"system:serviceaccount:{NAMESPACE}:operator"
_DAY_S = 86400
READY = "Ready"

Step = Callable[[str, int, int], None]
"""Told of progress: of what, how much is done, of how much."""


@dataclass(frozen=True)
class Call:
    """One request to the API server."""

    at: float
    verb: str
    resource: str

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}"


@dataclass
class Stand:
    """Everything around one operator."""

    kubernetes: Kubernetes
    keysvc: records.Counted
    rays: list[Ray]
    folder: Path
    objects: int
    operator: Program = field(init=False)

    def calls(self) -> list[Call]:
        """What the operator has asked of the API server so far, its watches included."""
        found: dict[str, Call] = {}
        with (self.folder / "kube" / AUDIT).open() as lines:
            for said in map(json.loads, lines):
                about = said.get("objectRef", {})
                part = f"/{about['subresource']}" if "subresource" in about else ""
                resource = about.get("resource", said["requestURI"].partition("?")[0]) + part
                at = datetime.fromisoformat(said["requestReceivedTimestamp"]).timestamp()
                found.setdefault(said["auditID"], Call(at, said["verb"], resource))
        return list(found.values())

    def ready(self) -> int:
        """How many objects are Ready."""
        found = self.kubernetes.objects.list_cluster_custom_object(GROUP, VERSION, ENCRYPTED_MODEL.plural)
        conditions = (one.get("status", {}).get("conditions", []) for one in found["items"])
        return sum(any(c["type"] == READY and c["status"] == "True" for c in each) for each in conditions)

    def process(self) -> psutil.Process:
        """The operator."""
        return psutil.Process(self.operator.pid)


@contextmanager
def standing(folder: Path, objects: int, interval_s: float, step: Step) -> Iterator[Stand]:
    """So many objects with their published replicas, and an operator that has just been started."""
    with ExitStack() as ends:
        world = records.opened(folder)
        ends.callback(world.measured.shutdown)
        ends.callback(world.service.database.close)
        rays = [Ray() for _ in range(-(-objects // MOST_APPLICATIONS))]
        urls = [ends.enter_context(serving(ray.app)) for ray in rays]
        for number in range(objects):
            which = number // MOST_APPLICATIONS
            records.publish(world, folder, number, _cluster(which), urls[which])
            step("replicas published", number + 1, objects)
        counted = records.Counted(world.app)
        keysvc = ends.enter_context(serving(counted))
        (folder / "kube").mkdir()
        server = ends.enter_context(running_apiserver(folder / "kube", audited=USER))
        made = Stand(Kubernetes(server), counted, rays, folder, objects)
        define(made.kubernetes)
        _create(made, urls, step)
        made.operator = _operator(made, keysvc, world.home.platform_key, interval_s)
        ends.callback(made.operator.stop)
        port = yaml.safe_load((folder / "operator.yaml").read_text())["port"]
        made.operator.start(lambda: _lives(port))
        yield made


def _cluster(number: int) -> str:
    return f"main-{number}"


def _create(stand: Stand, urls: list[str], step: Step) -> None:
    """Namespaces, each bound to its tenant, clusters, objects, and the operator's account."""
    core = client.CoreV1Api(stand.kubernetes.server.admin)
    for name in (JOBS, COMPUTE):
        core.create_namespace({"metadata": {"name": name}})
    for number, url in enumerate(urls):
        place = {"ray": ABSENT, "existing.dashboardUrl": url, "existing.serveUrl": url}
        stand.kubernetes.create(SERVING_CLUSTER, COMPUTE, serving_cluster(_cluster(number), **place))
    for number in range(stand.objects):
        name = records.tenant(number)
        core.create_namespace({"metadata": {"name": name, "annotations": {TENANTS: name}}})
        body = records.body(number, _cluster(number // MOST_APPLICATIONS))
        stand.kubernetes.create(ENCRYPTED_MODEL, name, body)
        step("objects created", number + 1, stand.objects)


def _operator(stand: Stand, keysvc: str, key: Path, interval_s: float) -> Program:
    server = stand.kubernetes.server
    server.account(NAMESPACE, "operator")
    client.RbacAuthorizationV1Api(server.admin).create_cluster_role_binding(
        {
            "metadata": {"name": "operator"},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": "cluster-admin",
            },
            "subjects": [{"kind": "ServiceAccount", "namespace": NAMESPACE, "name": "operator"}],
        }
    )
    token = server.token(NAMESPACE, "operator", seconds=_DAY_S)
    kubeconfig = write_kubeconfig(server, stand.folder / "kubeconfig", token)
    config = stand.folder / "operator.yaml"
    config.write_text(yaml.safe_dump(_options(stand.folder, keysvc, key, interval_s)))
    command = [sys.executable, "-m", "anamorph_operator.main", "kubernetes"]
    places = ["--config", str(config), "--kubeconfig", str(kubeconfig), "--name", "bench"]
    return Program([*command, *places], stand.folder / "operator.log")


def _options(folder: Path, keysvc: str, key: Path, interval_s: float) -> dict[str, Any]:
    return {
        "namespace": NAMESPACE,
        "jobs_namespace": JOBS,
        "compute_namespace": COMPUTE,
        "keysvc": keysvc,
        "keysvc_token_file": str(key),
        "ray_tokens": str(folder),
        "allow_base": ["s3://bases"],
        "interval_s": interval_s,
        "port": free_port(),
        "materializer": {"image": "registry.example/materializer:0.1"},
    }


def _lives(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/livez", trust_env=False, timeout=5).is_success
    except httpx.HTTPError:
        return False


def settle(stand: Stand, quiet_s: float, patience_s: float, step: Step) -> float:
    """Wait until every object is Ready and nothing is written any more; seconds that it took.

    Raises:
        AssertionError: it does not come to that.
    """
    began = time.time()
    while True:
        ready = stand.ready()
        step("objects Ready", ready, stand.objects)
        written = [call.at for call in stand.calls() if changes(call)]
        # First readings of usage come with a token and a report for each object.
        told = [at for at, what in list(stand.keysvc.calls) if what.startswith("POST")]
        last = max([began, *written, *told])
        if ready == stand.objects and time.time() - last >= quiet_s:
            return last - began
        assert time.time() - began < patience_s, f"{ready} of {stand.objects} are Ready"
        time.sleep(min(2.0, quiet_s / 2))


def changes(call: Call) -> bool:
    """Whether a call writes anything but the lease."""
    return call.verb not in {"get", "list", "watch"} and call.resource != "leases"
