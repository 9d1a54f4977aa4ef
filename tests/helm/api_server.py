"""A real API server with our CRDs and stand-ins for others', and ``kubectl`` for it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from kubernetes import client
from tests.helm.chart import CRDS, RELEASE, Object, helm
from tests.servers.find import binary
from tests.servers.kube import ApiServer, running_apiserver
from tests.servers.kubeconfig import write_kubeconfig

ZONES = (RELEASE, "anamorph-jobs", "anamorph-compute")
TESTS = "anamorph-test"
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

    server: ApiServer
    kubeconfig: Path

    def kubectl(
        self, *arguments: str, objects: list[Object] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run ``kubectl``, with ``objects`` on its standard input."""
        given = () if objects is None else ("-f", "-")
        command = [str(binary("kubectl")), "--kubeconfig", str(self.kubeconfig), *arguments, *given]
        text = yaml.safe_dump_all(objects or [])
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False)

    def tried(self, objects: list[Object]) -> subprocess.CompletedProcess[str]:
        """The answer to a server-side apply that changes nothing; unknown fields are refused."""
        dry = ("apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict")
        return self.kubectl(*dry, objects=objects)


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """An API server that knows all that the chart makes; all its files are in ``folder``."""
    with running_apiserver(folder) as server:
        admin = server.admin
        made = Cluster(server, write_kubeconfig(server, folder / "config"))
        ours = yaml.safe_load_all(helm("template", "crds", CRDS, "--kube-version", "1.35.0"))
        others = [definition(*kind) for kind in foreign()]
        done = made.kubectl("create", objects=[*ours, *others])
        assert done.returncode == 0, done.stderr
        await_definitions(admin)
        for zone in (*ZONES, TESTS):
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
