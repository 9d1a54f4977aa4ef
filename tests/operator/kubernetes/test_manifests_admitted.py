"""What we build is admitted by the real API server, where pod security is enforced at *restricted*."""

from __future__ import annotations

import time
import uuid
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import yaml
from kubernetes import client
from kubernetes.client import ApiException
from tests.operator.kubernetes.conftest import Kubernetes
from tests.operator.kubernetes.manifests import ALL, COMPUTE, FULL, MAKING, PLAIN, SCALING, SECURED, cluster
from tests.servers.find import kuberay_definition

from anamorph_operator.kubernetes.build import jobs
from anamorph_operator.kubernetes.build import materialization as made
from anamorph_operator.kubernetes.build.materialization import Materializer
from anamorph_operator.kubernetes.build.ray_group import Compute
from anamorph_operator.kubernetes.build.ray_service import ray_service
from anamorph_operator.kubernetes.build.serve_config import FIRST, serve_config

pytestmark = [pytest.mark.real]

Object = dict[str, Any]
SETTINGS: dict[str, Materializer] = {"plain": PLAIN, "full": FULL, "parts": replace(FULL, parts=4)}
CLUSTERS: dict[str, tuple[Object, Compute]] = {
    "smallest": ({}, COMPUTE),
    "all": (ALL, SECURED),
    "scaling": (SCALING, SECURED),
}
DRY = {"dry_run": "All", "field_validation": "Strict"}


@pytest.fixture(scope="module")
def restricted(kubernetes: Kubernetes) -> str:
    """A namespace that admits no pod but a restricted one, with the service account of the jobs."""
    name = f"jobs-{uuid.uuid4().hex[:8]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    core = client.CoreV1Api(kubernetes.server.admin)
    core.create_namespace({"metadata": {"name": name, "labels": labels}})
    for account in (made.account_name("acme"), "default"):
        core.create_namespaced_service_account(name, {"metadata": {"name": account}})
    scheduling = client.SchedulingV1Api(kubernetes.server.admin)
    scheduling.create_priority_class({"metadata": {"name": "serving"}, "value": 1000})
    return name


def admitted(kubernetes: Kubernetes, namespace: str, template: Object) -> None:
    """The pod of a template would be created here."""
    metadata = {"generateName": "pod-", "labels": template["metadata"]["labels"]}
    pod = {"metadata": metadata, "spec": template["spec"]}
    client.CoreV1Api(kubernetes.server.admin).create_namespaced_pod(namespace, pod, **DRY)


@pytest.mark.parametrize("case", SETTINGS)
def test_everything_of_a_materialisation_is_admitted(
    kubernetes: Kubernetes, restricted: str, case: str
) -> None:
    """Every field is one that the API server knows, and every pod one that the namespace takes."""
    settings = replace(SETTINGS[case], namespace=restricted)
    core, batch = (api(kubernetes.server.admin) for api in (client.CoreV1Api, client.BatchV1Api))
    core.create_namespaced_config_map(restricted, made.config_map(settings, MAKING), **DRY)
    account = made.service_account(settings, "globex")
    core.create_namespaced_service_account(restricted, account, **DRY)
    core.create_namespaced_persistent_volume_claim(restricted, jobs.claim(settings, MAKING), **DRY)
    for build in (jobs.whole, jobs.fold, jobs.finish):
        job = build(settings, MAKING)
        batch.create_namespaced_job(restricted, job, **DRY)
        admitted(kubernetes, restricted, job["spec"]["template"])


@pytest.mark.parametrize("spoilt", ["securityContext", "capabilities"])
def test_a_pod_that_is_not_restricted_is_refused(
    kubernetes: Kubernetes, restricted: str, spoilt: str
) -> None:
    """The control of the tests above: this namespace does refuse."""
    template = deepcopy(jobs.whole(FULL, MAKING)["spec"]["template"])
    if spoilt == "securityContext":
        del template["spec"]["securityContext"]
    else:
        del template["spec"]["containers"][0]["securityContext"]["capabilities"]
    with pytest.raises(ApiException, match="violates PodSecurity"):
        admitted(kubernetes, restricted, template)


@pytest.mark.parametrize("case", CLUSTERS)
def test_every_pod_of_ray_is_admitted(kubernetes: Kubernetes, restricted: str, case: str) -> None:
    """As we template it; KubeRay's own containers are for the tests on a cluster."""
    changes, compute = CLUSTERS[case]
    of = ray_service("main", cluster(**changes), compute)["spec"]["rayClusterConfig"]
    for group in (of["headGroupSpec"], *of.get("workerGroupSpecs", ())):
        admitted(kubernetes, restricted, group["template"])


@pytest.fixture(scope="module")
def kuberay(kubernetes: Kubernetes) -> client.CustomObjectsApi:
    definition = yaml.safe_load(kuberay_definition("rayservices").read_text())
    extensions = client.ApiextensionsV1Api(kubernetes.server.admin)
    extensions.create_custom_resource_definition(definition)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = extensions.read_custom_resource_definition("rayservices.ray.io")
        if any(c.type == "Established" and c.status == "True" for c in found.status.conditions or ()):
            return kubernetes.objects
        time.sleep(0.1)
    raise RuntimeError("KubeRay's definition did not come into force")


@pytest.mark.parametrize("case", CLUSTERS)
def test_kuberays_definition_admits_the_ray_service(
    kuberay: client.CustomObjectsApi, restricted: str, case: str
) -> None:
    """Every field is one that KubeRay knows."""
    changes, compute = CLUSTERS[case]
    spec = cluster(**changes)
    body = ray_service(
        "main", spec, replace(compute, namespace=restricted), serve_config(spec, compute, FIRST)
    )
    kuberay.create_namespaced_custom_object("ray.io", "v1", restricted, "rayservices", body, **DRY)
    body["spec"]["rayClusterConfig"]["headGroupSpec"]["replicaz"] = 1
    with pytest.raises(ApiException, match="unknown field"):
        kuberay.create_namespaced_custom_object("ray.io", "v1", restricted, "rayservices", body, **DRY)
