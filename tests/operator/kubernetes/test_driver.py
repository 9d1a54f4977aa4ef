"""The whole driver: kopf on a real API server, over a real key service; Ray is as it answers its operator."""

from __future__ import annotations

import time

import pytest
from tests.operator.kubernetes.conftest import Serve
from tests.operator.kubernetes.scene import SERVE, Scene, until

from anamorph.wire.states import State
from anamorph_keysvc.scope import PLATFORM
from anamorph_keysvc.service import lookup
from anamorph_operator.kubernetes.handlers import FINALIZER
from anamorph_operator.kubernetes.resources.admission import TENANTS
from anamorph_operator.kubernetes.resources.objects import FORCE_DELETE, ROTATE

pytestmark = pytest.mark.real


def test_a_resource_becomes_a_served_model(scene: Scene, serve: Serve) -> None:
    serve()
    assert scene.state(1) is State.ACTIVE
    assert scene.ray.names == ["door", "acme.chat.v1"]
    found = scene.read()
    assert found["metadata"]["finalizers"] == [FINALIZER]
    assert found["status"]["activeVersion"] == 1
    assert found["status"]["endpoint"] == f"{SERVE}/acme/chat/v1"
    assert "annotations" not in found["metadata"]


def test_a_cluster_s_new_address_reaches_what_it_serves(scene: Scene, serve: Serve) -> None:
    """The status and the key service have it; nothing is rotated, and the engine is not started anew."""
    serve()
    [engine] = [one for one in scene.ray.written if one["name"] != "door"]
    scene.readdress("https://models.example.com/")
    told = "https://models.example.com/acme/chat/v1"
    until(lambda: scene.read()["status"]["endpoint"] == told, "the status")
    with scene.world.service.database.read(PLATFORM) as session:
        assert lookup.version(session, "acme", "chat", 1).endpoint == told
    assert scene.state(2) is None
    assert engine in scene.ray.written
    assert scene.condition("Ready") == ("True", "Ready")


def test_an_annotation_rotates_once(scene: Scene, serve: Serve) -> None:
    serve()
    scene.annotate(ROTATE, "because")
    until(lambda: scene.prepared(2), "a second key")
    until(lambda: scene.condition("Rotating") == ("True", "Issuing") or scene.job_count() == 2, "a job")
    scene.materialise(2)
    until(lambda: scene.read()["status"].get("activeVersion") == 2, "the second is active")
    until(lambda: scene.read()["status"].get("rotateRequest") == "because", "answered")
    scene.annotate("unrelated", "text")
    time.sleep(1.5)
    assert scene.state(3) is None


def test_a_settled_model_costs_no_write(scene: Scene, serve: Serve) -> None:
    """And of reads only the Jobs of each cluster."""
    serve()
    time.sleep(2)
    before = scene.read()["metadata"]["resourceVersion"]
    scene.calls.clear()
    time.sleep(4)
    assert scene.read()["metadata"]["resourceVersion"] == before
    assert set(scene.calls) == {"list jobs"}


def test_a_deletion_takes_applications_and_keys_along(scene: Scene, serve: Serve) -> None:
    serve()
    scene.delete()
    until(lambda: scene.models() == [], "gone")
    assert scene.ray.names == ["door"]
    assert scene.state(1) is State.DESTROY_SCHEDULED


def test_a_held_up_deletion_is_ended_by_force_and_says_so(scene: Scene, serve: Serve) -> None:
    serve()
    scene.ray.sticky = True
    scene.delete()
    until(lambda: scene.state(1) is State.DESTROY_SCHEDULED, "revoked")
    time.sleep(2)
    assert scene.models() == ["chat"]
    scene.annotate(FORCE_DELETE, "true")
    until(lambda: scene.models() == [], "gone")

    def said() -> bool:
        events = scene.core.list_namespaced_event(scene.team).items
        return any(one.reason == "DeletionForced" and "acme.chat.v1" in one.message for one in events)

    until(said, "the event")


def test_a_resource_that_must_not_name_its_tenant_gets_nothing(scene: Scene) -> None:
    """Nor does its deletion take anything, and it is not held up: somebody has taken the binding away."""
    scene.cluster()
    scene.core.patch_namespace(scene.team, {"metadata": {"annotations": {TENANTS: "acme,other"}}})
    scene.model()
    until(lambda: scene.prepared(1), "a key")
    scene.core.patch_namespace(scene.team, {"metadata": {"annotations": {TENANTS: "other"}}})
    until(lambda: scene.condition("Degraded") == ("True", "NamespaceNotBound"), "refused")
    scene.delete()
    until(lambda: scene.models() == [], "gone")
    assert scene.state(1) in {State.PENDING, State.MATERIALIZING}
    assert scene.state(2) is None


def test_of_two_resources_for_one_model_the_older_one_counts(scene: Scene, serve: Serve) -> None:
    serve()
    scene.model("other", model="chat")
    until(lambda: scene.condition("Ready", "other") == ("False", "Duplicate"), "told")
    scene.delete("other")
    until(lambda: scene.models() == ["chat"], "gone")
    assert scene.state(1) is State.ACTIVE


def test_a_cluster_that_there_is_not_is_told(scene: Scene) -> None:
    scene.model()
    until(lambda: scene.condition("Ready") is not None, "a status")
    assert scene.state(1) is None
