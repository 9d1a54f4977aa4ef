"""Resources that change: what stands goes on as it was issued, and a new version comes beside it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.operator.kubernetes.conftest import Serve
from tests.operator.kubernetes.scene import SERVE, Scene, until

from anamorph.wire.states import State

pytestmark = pytest.mark.real

FIRST, SECOND = "acme.chat.v1", "acme.chat.v2"


def app(scene: Scene, name: str, host: str = "ray") -> dict[str, Any]:
    [found] = [one for one in scene.rays[host].written if one["name"] == name]
    return dict(found["args"])


def record(scene: Scene) -> dict[str, Any]:
    [[base, serving, policy]] = scene.world.sql("SELECT base, serving, policy FROM model WHERE id = 'chat'")
    return {"base": base, "serving": json.loads(serving), "policy": json.loads(policy)}


def issued_under(scene: Scene, version: int) -> dict[str, Any]:
    asked = "SELECT settings FROM key_version WHERE model = 'chat' AND version = ?"
    [[settings]] = scene.world.sql(asked, version)
    return dict(json.loads(settings))


def bring(scene: Scene, version: int) -> dict[str, Any]:
    """Bring a version into service that the operator has asked for, and say what its Job was told."""
    until(lambda: scene.prepared(version), "a key")
    until(lambda: scene.order(version) is not None, "a job")
    order = scene.order(version)
    assert order is not None
    scene.materialise(version)
    until(lambda: scene.read()["status"].get("activeVersion") == version, "active")
    until(lambda: scene.condition("Rotating") == ("False", "Settled"), "settled")
    return order


def settled(scene: Scene) -> None:
    """Both stand, the first as one that drains, and no third comes."""
    assert (scene.state(1), scene.state(2), scene.state(3)) == (State.DRAINING, State.ACTIVE, None)
    assert scene.condition("Ready") == ("True", "Ready")


@pytest.mark.parametrize("replicas", [{"minReplicas": 2, "maxReplicas": 2}, {"maxReplicas": 3}])
def test_more_replicas_are_a_version_beside_the_old_one(
    scene: Scene, serve: Serve, replicas: dict[str, int]
) -> None:
    serve()
    before = app(scene, FIRST)
    scene.change({"serving": {"autoscaling": replicas}})
    bring(scene, 2)
    settled(scene)
    assert record(scene)["serving"]["autoscaling"]["max_replicas"] == replicas["maxReplicas"]
    assert app(scene, SECOND)["autoscaling"]["max_replicas"] == replicas["maxReplicas"]
    assert app(scene, SECOND)["autoscaling"]["min_replicas"] == replicas.get("minReplicas", 1)
    assert app(scene, FIRST) == before


def test_another_base_is_folded_into_a_version_beside_the_old_one(scene: Scene, serve: Serve) -> None:
    serve()
    before = app(scene, FIRST)
    scene.change({"base": {"uri": "s3://bases/other"}})
    order = bring(scene, 2)
    settled(scene)
    assert record(scene)["base"] == order["base"] == "s3://bases/other"
    assert (issued_under(scene, 1)["base"], issued_under(scene, 2)["base"]) == (
        "s3://bases/smollm2",
        "s3://bases/other",
    )
    assert app(scene, FIRST) == before


def test_a_model_moves_by_a_version_on_the_other_cluster(scene: Scene, serve: Serve) -> None:
    """Its old version stays where it is; clients are told of the other place by the new one's endpoint."""
    serve()
    serving_there = {
        "existing.dashboardUrl": "http://ray-other:8265",
        "existing.serveUrl": "http://other:8000",
    }
    scene.cluster("other", **serving_there)
    until(lambda: scene.rays["ray-other"].names == ["door"], "the other cluster")
    scene.change({"servingCluster": "other"})
    bring(scene, 2)
    settled(scene)
    assert scene.rays["ray-other"].names == ["door", SECOND]
    assert scene.ray.names == ["door", FIRST]
    status = scene.read()["status"]
    assert status["endpoint"] == "http://other:8000/acme/chat/v2"
    lies = {one["version"]: one["servingCluster"] for one in status["versions"]}
    assert lies == {1: "main", 2: "other"}
    assert SERVE not in status["endpoint"]


def test_a_change_while_a_version_is_made_gives_that_one_up(scene: Scene) -> None:
    scene.cluster()
    scene.model()
    until(lambda: scene.prepared(1), "a key")
    scene.change({"base": {"uri": "s3://bases/other"}})
    until(lambda: scene.state(1) is State.FAILED, "given up")
    assert bring(scene, 2)["base"] == "s3://bases/other"
    assert (scene.state(2), scene.state(3)) == (State.ACTIVE, None)


def test_another_rotation_policy_is_no_rotation(scene: Scene, serve: Serve) -> None:
    serve()
    scene.change({"rotationPolicy": {"graceSeconds": 1234}})
    until(lambda: record(scene)["policy"]["grace_s"] == 1234, "patched")
    until(lambda: scene.read()["status"]["observedGeneration"] == 2, "seen")
    assert scene.state(2) is None
