"""What may connect to what: the zones' table, and how a pod is asked to try."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from tests.cluster.cluster import COMPUTE, JOBS, RELEASE, Cluster, Object

_NAME = "app.kubernetes.io/component"
TARGETS = {
    "key service": (f"anamorph-keysvc.{RELEASE}.svc", 8400),
    "Vault": (f"anamorph-vault.{RELEASE}.svc", 8200),
    "PostgreSQL": (f"anamorph-postgresql.{RELEASE}.svc", 5432),
    "store": (f"anamorph-objectstore.{RELEASE}.svc", 8333),
    "Redis": (f"anamorph-redis.{COMPUTE}.svc", 6379),
    "Serve": (f"main-serve-svc.{COMPUTE}.svc", 8000),
    "dashboard": (f"main-head-svc.{COMPUTE}.svc", 8265),
    "Ray's head": (f"main-head-svc.{COMPUTE}.svc", 6379),
    "API server": ("kubernetes.default.svc", 443),
}
"""By their Services. The kubelet and a listener outside are added when the node's address is known."""

MAY: Mapping[str, frozenset[str]] = {
    "key service": frozenset({"Vault", "PostgreSQL", "store", "API server"}),
    "operator": frozenset({"key service", "store", "Serve", "dashboard", "API server"}),
    "job": frozenset({"key service", "store"}),
    "engine": frozenset({"store", "Redis", "Serve", "dashboard", "Ray's head"}),
    "head": frozenset({"store", "Redis", "Serve", "dashboard", "Ray's head"}),
    # Its own namespace has no policies, so this is about what lets it in; the other two are its own affair.
    "tenant": frozenset({"API server", "kubelet", "outside"}),
}
"""From each kind of pod to what; to nothing else."""

_TRY = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor
def reached(place):
    try:
        socket.create_connection(tuple(place), 4).close()
        return True
    except OSError:
        return False
targets = json.loads(sys.argv[1])
with ThreadPoolExecutor(len(targets)) as pool:
    print(json.dumps(dict(zip(targets, pool.map(reached, targets.values())))))
"""


@dataclass(frozen=True)
class Prober:
    """A pod that tries."""

    namespace: str
    pod: str
    container: str

    def reached(self, cluster: Cluster, targets: Mapping[str, tuple[str, int]]) -> frozenset[str]:
        """Those that accept a connection."""
        words = ("python3", "-c", _TRY, json.dumps(targets))
        found = json.loads(cluster.run(self.namespace, self.pod, *words, container=self.container))
        return frozenset(name for name, reached in found.items() if reached)


def probers(cluster: Cluster, tenant: str) -> dict[str, Prober]:
    """A pod of each kind; those of jobs and of the tenant are made for this.

    Args:
        tenant: its namespace.
    """
    for namespace in (JOBS, tenant):
        cluster.kubectl("apply", "-f", "-", stdin=json.dumps(_pod(namespace)))
        cluster.kubectl("wait", "-n", namespace, "pod/prober", "--for=condition=Ready", "--timeout=120s")
    return {
        "key service": Prober(RELEASE, cluster.pod(RELEASE, f"{_NAME}=keysvc"), "keysvc"),
        "operator": Prober(RELEASE, cluster.pod(RELEASE, f"{_NAME}=operator"), "operator"),
        "job": Prober(JOBS, "prober", "prober"),
        "engine": Prober(COMPUTE, cluster.pod(COMPUTE, "ray.io/node-type=worker"), "ray"),
        "head": Prober(COMPUTE, cluster.pod(COMPUTE, "ray.io/node-type=head"), "ray"),
        "tenant": Prober(tenant, "prober", "prober"),
    }


def remove_probers(cluster: Cluster, tenant: str) -> None:
    """Those that ``probers`` has made."""
    for namespace in (JOBS, tenant):
        cluster.kubectl("delete", "pod", "-n", namespace, "prober", "--grace-period=1")


def _pod(namespace: str) -> Object:
    container = {
        "name": "prober",
        "image": "localhost/anamorph-keysvc:0.1.0",
        "imagePullPolicy": "IfNotPresent",
        "command": ["sleep", "3600"],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "128Mi"}},
    }
    security = {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}}
    spec = {"automountServiceAccountToken": False, "securityContext": security, "containers": [container]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "prober", "namespace": namespace},
        "spec": spec,
    }


@contextmanager
def outside(cluster: Cluster) -> Iterator[dict[str, tuple[str, int]]]:
    """The node's kubelet, and a listener at the node's address, which stands for everything outside."""
    [node] = [
        one
        for one in cluster.get("nodes")["items"]
        if "kwok.x-k8s.io/node" not in one["metadata"].get("annotations", {})
    ]
    [address] = [one["address"] for one in node["status"]["addresses"] if one["type"] == "InternalIP"]
    with socket.create_server(("", 0), backlog=64) as listener:
        yield {"kubelet": (address, 10250), "outside": (address, listener.getsockname()[1])}


@contextmanager
def no_policies(cluster: Cluster) -> Iterator[None]:
    """The control: as it would be without them."""
    found = cluster.get("networkpolicies", "-A")["items"]
    for one in found:
        for field in ("uid", "resourceVersion", "creationTimestamp", "managedFields", "generation"):
            one["metadata"].pop(field, None)
    for one in found:
        cluster.kubectl(
            "delete", "networkpolicy", "-n", one["metadata"]["namespace"], one["metadata"]["name"]
        )
    try:
        yield
    finally:
        cluster.kubectl(
            "create", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": found})
        )
