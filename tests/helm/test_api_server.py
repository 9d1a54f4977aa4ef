"""A real API server takes what the chart renders, and its pods under pod security ``restricted``."""

from __future__ import annotations

import pytest
from tests.helm.api_server import Cluster
from tests.helm.chart import Object, of_kind, pod_templates

pytestmark = [pytest.mark.real, pytest.mark.slow]


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
