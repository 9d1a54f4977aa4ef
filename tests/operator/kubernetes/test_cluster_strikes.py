"""How the cluster tests kill pods, and what they then see, tried on a real API server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from kubernetes import client
from tests.cluster.cluster import Cluster
from tests.cluster.strikes import kill
from tests.operator.kubernetes.conftest import Kubernetes
from tests.servers.find import binary
from tests.servers.kubeconfig import write_kubeconfig

pytestmark = pytest.mark.real
NAMESPACE, PART = "strikes", {"part": "job"}


@pytest.fixture
def cluster(kubernetes: Kubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("PATH", f"{binary('kubectl').parent}:{os.environ['PATH']}")
    return Cluster(write_kubeconfig(kubernetes.server, tmp_path / "kubeconfig"))


def pod(core: client.CoreV1Api, name: str, labels: dict[str, str], phase: str) -> None:
    spec = {"containers": [{"name": "x", "image": "x"}]}
    core.create_namespaced_pod(NAMESPACE, {"metadata": {"name": name, "labels": labels}, "spec": spec})
    core.patch_namespaced_pod_status(name, NAMESPACE, {"status": {"phase": phase}})


def test_only_what_is_not_done_is_killed(kubernetes: Kubernetes, cluster: Cluster) -> None:
    """It is gone at once, without its kubelet; where nothing was there to be killed, that is said."""
    core = client.CoreV1Api(kubernetes.server.admin)
    kubernetes.server.account(NAMESPACE, "default")
    for name, labels, phase in (
        ("starts", PART, "Pending"),
        ("runs", PART, "Running"),
        ("done", PART, "Succeeded"),
        ("failed", PART, "Failed"),
        ("other", {"part": "vault"}, "Running"),
    ):
        pod(core, name, labels, phase)
    assert kill(cluster, NAMESPACE, "part=job")
    left = {one.metadata.name for one in core.list_namespaced_pod(NAMESPACE).items}
    assert left == {"done", "failed", "other"}
    assert not kill(cluster, NAMESPACE, "part=job")
