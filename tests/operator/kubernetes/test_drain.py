"""Draining before the operator goes: finalizers come off, objects stay, and nothing of others' is touched."""

from __future__ import annotations

from typing import Any

import pytest
from kubernetes import client
from tests.operator.kubernetes.conftest import Kubernetes
from tests.operator.kubernetes.objects import encrypted_model

from anamorph_operator.kubernetes.drain import Drain
from anamorph_operator.kubernetes.resources.definition import ENCRYPTED_MODEL
from anamorph_operator.kubernetes.resources.part import GROUP, VERSION

pytestmark = [pytest.mark.real]

OURS, OTHERS = "anamorph.dev/replicas", "example.com/theirs"
LABELS = {"app": "operator"}


@pytest.fixture
def namespace(kubernetes: Kubernetes) -> str:
    """A namespace with the operator's Deployment in it, whose pods nobody makes."""
    name = kubernetes.namespace()
    pod = {"containers": [{"name": "operator", "image": "operator:1"}]}
    spec = {"replicas": 2, "selector": {"matchLabels": LABELS}}
    body = {
        "metadata": {"name": "operator"},
        "spec": {**spec, "template": {"metadata": {"labels": LABELS}, "spec": pod}},
    }
    client.AppsV1Api(kubernetes.server.admin).create_namespaced_deployment(name, body)
    return name


class Clock:
    """Time that passes by waiting."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def drained(kubernetes: Kubernetes, namespace: str, wait_s: float = 0) -> list[str]:
    said: list[str] = []
    clock = Clock()
    Drain(kubernetes.server.admin, namespace, "operator", said.append, clock, clock.sleep).run(wait_s)
    return said


def model(kubernetes: Kubernetes, namespace: str, *finalizers: str) -> None:
    body = encrypted_model()
    body["metadata"]["finalizers"] = list(finalizers)
    kubernetes.create(ENCRYPTED_MODEL, namespace, body)


def found(kubernetes: Kubernetes, namespace: str) -> dict[str, Any]:
    read = kubernetes.objects.get_namespaced_custom_object(
        GROUP, VERSION, namespace, ENCRYPTED_MODEL.plural, "chat"
    )
    return dict(read)


def test_our_finalizers_come_off_and_others_stay(kubernetes: Kubernetes, namespace: str) -> None:
    """The object stays, with somebody else's finalizer, and the operator is scaled to nothing."""
    model(kubernetes, namespace, OURS, OTHERS)
    assert any("finalizer taken off" in line for line in drained(kubernetes, namespace))
    metadata = found(kubernetes, namespace)["metadata"]
    assert metadata["finalizers"] == [OTHERS]
    assert "deletionTimestamp" not in metadata
    apps = client.AppsV1Api(kubernetes.server.admin)
    assert apps.read_namespaced_deployment("operator", namespace).spec.replicas == 0


def test_what_is_being_deleted_goes_when_the_wait_is_over(kubernetes: Kubernetes, namespace: str) -> None:
    """It is named, since nobody has removed its replicas."""
    model(kubernetes, namespace, OURS)
    kubernetes.objects.delete_namespaced_custom_object(
        GROUP, VERSION, namespace, ENCRYPTED_MODEL.plural, "chat"
    )
    said = drained(kubernetes, namespace, wait_s=5)
    assert any("still being deleted" in line for line in said)
    with pytest.raises(client.ApiException, match="404"):
        found(kubernetes, namespace)


def test_a_second_run_changes_nothing(kubernetes: Kubernetes, namespace: str) -> None:
    """A hook may be started again."""
    model(kubernetes, namespace, OURS)
    drained(kubernetes, namespace)
    before = found(kubernetes, namespace)
    assert not any("chat" in line for line in drained(kubernetes, namespace))
    assert found(kubernetes, namespace) == before


def test_finalizers_stay_while_the_operator_runs(kubernetes: Kubernetes, namespace: str) -> None:
    """It would only put them on again."""
    model(kubernetes, namespace, OURS)
    kubernetes.server._namespaces.add(namespace)
    kubernetes.server.account(namespace, "default")
    pod = {"containers": [{"name": "operator", "image": "operator:1"}]}
    core = client.CoreV1Api(kubernetes.server.admin)
    core.create_namespaced_pod(namespace, {"metadata": {"name": "one", "labels": LABELS}, "spec": pod})
    with pytest.raises(TimeoutError, match="do not end"):
        drained(kubernetes, namespace)
    assert found(kubernetes, namespace)["metadata"]["finalizers"] == [OURS]
