"""A real API server takes what the chart renders, and its pods under pod security ``restricted``."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from kubernetes import client
from tests.helm.chart import CRDS, RELEASE, Object, helm, of_kind, pod_templates
from tests.servers.find import binary
from tests.servers.kube import running_apiserver

pytestmark = [pytest.mark.real, pytest.mark.slow]

ZONES = (RELEASE, "anamorph-jobs", "anamorph-compute")
# Resources of others that the chart makes objects of; their own schemas are theirs to check.
FOREIGN = {
    "monitoring.coreos.com/v1": {
        "ServiceMonitor": "servicemonitors",
        "PodMonitor": "podmonitors",
        "PrometheusRule": "prometheusrules",
    },
    "cert-manager.io/v1": {"Certificate": "certificates", "Issuer": "issuers"},
    "gateway.networking.k8s.io/v1": {"HTTPRoute": "httproutes", "BackendTLSPolicy": "backendtlspolicies"},
}


@dataclass
class Cluster:
    """An API server with our CRDs, and the namespaces of the zones."""

    kubeconfig: Path

    def kubectl(self, *arguments: str, objects: list[Object]) -> subprocess.CompletedProcess[str]:
        text = yaml.safe_dump_all(objects)
        command = [str(binary("kubectl")), "--kubeconfig", str(self.kubeconfig), *arguments, "-f", "-"]
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False)

    def tried(self, objects: list[Object]) -> subprocess.CompletedProcess[str]:
        """The answer to a server-side apply that changes nothing; unknown fields are refused."""
        dry = ("apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict")
        return self.kubectl(*dry, objects=objects)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_apiserver(tmp_path_factory.mktemp("kubernetes")) as server:
        admin, folder = server.admin, tmp_path_factory.mktemp("kubectl")
        made = Cluster(
            kubeconfig(folder, server.url, server.ca_file, admin.configuration.api_key["BearerToken"])
        )
        ours = yaml.safe_load_all(helm("template", "crds", CRDS, "--kube-version", "1.35.0"))
        others = [definition(*kind) for kind in foreign()]
        done = made.kubectl("create", objects=[*ours, *others])
        assert done.returncode == 0, done.stderr
        await_definitions(admin)
        for zone in ZONES:
            labels = {"pod-security.kubernetes.io/enforce": "restricted"}
            client.CoreV1Api(admin).create_namespace({"metadata": {"name": zone, "labels": labels}})
            server._namespaces.add(zone)
            server.account(zone, "default")
        yield made


def foreign() -> list[tuple[str, str, str]]:
    return [(group, kind, plural) for group, kinds in FOREIGN.items() for kind, plural in kinds.items()]


def definition(api_version: str, kind: str, plural: str) -> Object:
    group, version = api_version.split("/")
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    served = {"name": version, "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{plural}.{group}",
            # The gateway's group is Kubernetes' own, which wants to be asked.
            "annotations": {"api-approved.kubernetes.io": "unapproved, for a test"},
        },
        "spec": {
            "group": group,
            "names": {"kind": kind, "plural": plural},
            "scope": "Namespaced",
            "versions": [served],
        },
    }


def await_definitions(admin: client.ApiClient) -> None:
    """Until the API server serves what was defined."""
    extensions, objects = client.ApiextensionsV1Api(admin), client.CustomObjectsApi(admin)
    for found in extensions.list_custom_resource_definition().items:
        for _ in range(300):
            try:
                objects.list_cluster_custom_object(
                    found.spec.group, found.spec.versions[0].name, found.spec.names.plural
                )
                break
            except client.ApiException:
                time.sleep(0.1)


def kubeconfig(folder: Path, url: str, ca_file: Path, token: str) -> Path:
    file = folder / "config"
    entry = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "it",
        "clusters": [{"name": "it", "cluster": {"server": url, "certificate-authority": str(ca_file)}}],
        "users": [{"name": "it", "user": {"token": token.removeprefix("Bearer ")}}],
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
    }
    file.write_text(json.dumps(entry))
    return file


def test_the_api_server_takes_every_object(cluster: Cluster, objects: list[Object]) -> None:
    """Server-side dry run of the whole variant, unknown and doubled fields refused."""
    done = cluster.tried(objects)
    assert done.returncode == 0, done.stderr


def test_it_does_refuse_what_is_wrong(cluster: Cluster, objects: list[Object]) -> None:
    """The control: a misspelt field of any object is seen."""
    [first, *_] = of_kind(objects, "ServiceAccount")
    assert cluster.tried([{**first, "automountToken": False}]).returncode != 0


def pods(objects: list[Object]) -> list[Object]:
    """A pod of each template, in the namespace that it would be in."""
    found = []
    namespaces = {one["metadata"]["name"]: one["metadata"].get("namespace") for one in objects}
    for name, template in pod_templates(objects):
        metadata = {**template["metadata"], "name": name, "namespace": namespaces[name]}
        claims = {"name": "data", "emptyDir": {}}
        spec = dict(template["spec"])
        if any(mount["name"] == "data" for one in spec["containers"] for mount in one["volumeMounts"]):
            spec["volumes"] = [*spec.get("volumes", []), claims]
        found.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    return found


def test_every_pod_is_admitted_as_restricted(cluster: Cluster, objects: list[Object]) -> None:
    """Namespaces that enforce ``restricted`` admit each pod; a privileged one they refuse."""
    accounts = of_kind(objects, "ServiceAccount")
    made = cluster.kubectl("apply", "--server-side", objects=accounts)
    assert made.returncode == 0, made.stderr
    wanted = pods(objects)
    done = cluster.tried(wanted)
    assert done.returncode == 0, done.stderr
    loose = {**wanted[0], "spec": {**wanted[0]["spec"], "hostNetwork": True}}
    assert "violates PodSecurity" in cluster.tried([loose]).stderr
