"""Calls to a real API server: what they do, and what they say when they may not."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client as kubernetes_client
from tests.operator.kubernetes.conftest import Kubernetes
from tests.operator.kubernetes.objects import encrypted_model
from tests.servers.kubeconfig import write_kubeconfig
from tests.servers.process import free_port

from anamorph import errors
from anamorph_operator.kubernetes.api import PAGE, Api, Client, configuration
from anamorph_operator.kubernetes.catalogue import CONFIG_MAPS, ENCRYPTED_MODELS, JOBS, NAMESPACES, Resource
from anamorph_operator.kubernetes.resources.definition import ENCRYPTED_MODEL

Connect = Callable[..., Client]


@pytest.fixture
def connect(kubernetes: Kubernetes, tmp_path: Path) -> Iterator[Connect]:
    made: list[Client] = []

    def connect(token: str | None = None, url: str | None = None, **options: Any) -> Client:
        file = write_kubeconfig(kubernetes.server, tmp_path / f"{len(made)}.json", token, url)
        made.append(Client(configuration(file), **options))
        return made[-1]

    yield connect
    for one in made:
        one.close()


@pytest.fixture
def admin(connect: Connect) -> Client:
    return connect()


def config_map(namespace: str, **data: str) -> dict[str, Any]:
    metadata = {"name": "settings", "namespace": namespace}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def test_apply_makes_changes_and_takes_back_what_it_set(kubernetes: Kubernetes, admin: Client) -> None:
    """What was applied before and is left out now goes; what others set stays."""
    namespace = kubernetes.namespace()
    admin.apply(config_map(namespace, ours="1", also="2"))
    core = kubernetes_client.CoreV1Api(kubernetes.server.admin)
    core.patch_namespaced_config_map("settings", namespace, {"data": {"theirs": "3"}})
    applied = admin.apply(config_map(namespace, ours="4"))
    assert applied["data"] == {"ours": "4", "theirs": "3"}


def test_apply_of_the_same_writes_nothing(kubernetes: Kubernetes, admin: Client) -> None:
    namespace = kubernetes.namespace()
    first = admin.apply(config_map(namespace, a="1"))
    again = admin.apply(config_map(namespace, a="1"))
    assert again["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]


def test_apply_takes_no_field_of_somebody_else_unless_forced(kubernetes: Kubernetes, admin: Client) -> None:
    namespace = kubernetes.namespace()
    core = kubernetes_client.CoreV1Api(kubernetes.server.admin)
    core.create_namespaced_config_map(namespace, config_map(namespace, a="theirs"))
    with pytest.raises(errors.Conflict, match="conflict with"):
        admin.apply(config_map(namespace, a="ours"))
    assert admin.apply(config_map(namespace, a="ours"), force=True)["data"] == {"a": "ours"}


def test_status_is_written_at_the_version_that_was_read(kubernetes: Kubernetes, admin: Client) -> None:
    """A status that was computed from an older object is refused, and a field that is left out goes."""
    namespace = kubernetes.namespace()
    made = kubernetes.create(ENCRYPTED_MODEL, namespace, encrypted_model("chat"))
    written = admin.apply(status(made, activeVersion=3, endpoint="http://e"), part="status", force=True)
    assert (written["status"]["activeVersion"], written["status"]["endpoint"]) == (3, "http://e")
    with pytest.raises(errors.Conflict):
        admin.apply(status(made, activeVersion=4), part="status", force=True)
    later = admin.apply(status(written, activeVersion=4), part="status", force=True)
    assert "endpoint" not in later["status"]
    assert later["spec"] == made["spec"]


def status(of: dict[str, Any], **fields: Any) -> dict[str, Any]:
    kept = {key: of["metadata"][key] for key in ("name", "namespace", "resourceVersion")}
    return {"apiVersion": of["apiVersion"], "kind": of["kind"], "metadata": kept, "status": fields}


def test_of_two_that_replace_one_object_one_is_refused(kubernetes: Kubernetes, admin: Client) -> None:
    namespace = kubernetes.namespace()
    made = admin.create(config_map(namespace, a="0")) | {"apiVersion": "v1", "kind": "ConfigMap"}
    admin.update(made | {"data": {"a": "1"}})
    with pytest.raises(errors.Conflict):
        admin.update(made | {"data": {"a": "2"}})


def test_a_name_that_is_taken_is_told_apart(kubernetes: Kubernetes, admin: Client) -> None:
    namespace = kubernetes.namespace()
    admin.create(config_map(namespace))
    with pytest.raises(errors.Conflict) as caught:
        admin.create(config_map(namespace))
    assert caught.value.code == "AlreadyExists"


def test_delete_means_the_very_object(kubernetes: Kubernetes, admin: Client) -> None:
    namespace = kubernetes.namespace()
    made = admin.create(config_map(namespace))
    with pytest.raises(errors.Conflict):
        admin.delete(CONFIG_MAPS, namespace, "settings", uid=str(uuid.uuid4()))
    admin.delete(CONFIG_MAPS, namespace, "settings", uid=made["metadata"]["uid"])
    admin.delete(CONFIG_MAPS, namespace, "settings")  # gone already
    with pytest.raises(errors.NotFound):
        admin.get(CONFIG_MAPS, namespace, "settings")


def test_a_list_is_read_by_pages_and_by_labels(
    kubernetes: Kubernetes, admin: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = kubernetes.namespace()
    for number in range(5):
        body = config_map(namespace)
        body["metadata"] |= {"name": f"n{number}", "labels": {"even": str(number % 2 == 0).lower()}}
        admin.create(body)
    assert PAGE >= 100
    monkeypatch.setattr("anamorph_operator.kubernetes.api.PAGE", 2)
    names = [found["metadata"]["name"] for found in admin.list(CONFIG_MAPS, namespace)]
    assert names == ["n0", "n1", "n2", "n3", "n4"]
    assert len(admin.list(CONFIG_MAPS, namespace, "even=true")) == 3


def test_who_may_not_learns_the_verb_and_the_resource(kubernetes: Kubernetes, connect: Connect) -> None:
    account = kubernetes.server.account("zone-a")
    nobody = connect(kubernetes.server.token("zone-a", account))
    with pytest.raises(errors.Forbidden, match=r"grant the operator the verb 'create' on configmaps"):
        nobody.create(config_map("zone-a"))
    with pytest.raises(errors.Forbidden, match=r"grant the operator the verb 'list' on jobs\.batch"):
        nobody.list(JOBS, "zone-a")


def test_a_refusal_by_policy_asks_for_no_grant(kubernetes: Kubernetes, admin: Client) -> None:
    body = encrypted_model("chat")
    body["metadata"]["namespace"] = kubernetes.namespace("others")
    with pytest.raises(errors.Forbidden, match="is not bound to tenant acme") as caught:
        admin.create(body)
    assert "grant" not in str(caught.value)


def test_an_object_against_the_rules_is_unprocessable(kubernetes: Kubernetes, admin: Client) -> None:
    body = encrypted_model("chat", vocabSize=0)
    body["metadata"]["namespace"] = kubernetes.namespace()
    with pytest.raises(errors.Unprocessable, match=r"spec\.vocabSize"):
        admin.create(body)


def test_an_unknown_field_is_refused(kubernetes: Kubernetes, admin: Client) -> None:
    body = encrypted_model("chat", nonsense=1)
    body["metadata"]["namespace"] = kubernetes.namespace()
    with pytest.raises(errors.AnamorphError, match="nonsense"):
        admin.apply(body)


def test_a_wrong_token_is_told_apart(connect: Connect) -> None:
    with pytest.raises(errors.Unauthenticated):
        connect("wrong").list(NAMESPACES, None)


def test_nobody_there_is_unavailable(connect: Connect) -> None:
    away = connect(url=f"https://127.0.0.1:{free_port()}", timeout_s=2)
    with pytest.raises(errors.Unavailable, match="does not answer"):
        away.list(NAMESPACES, None)


def test_another_authority_is_unavailable(kubernetes: Kubernetes, tmp_path: Path) -> None:
    """A failed handshake: nothing was sent, the token neither."""
    settings = configuration(write_kubeconfig(kubernetes.server, tmp_path / "config"))
    settings.ssl_ca_cert = None  # the machine's own authorities
    elsewhere = Client(settings)
    with pytest.raises(errors.Unavailable):
        elsewhere.list(NAMESPACES, None)
    elsewhere.close()


def test_no_write_passes_the_fence(kubernetes: Kubernetes, connect: Connect) -> None:
    class Fenced(Exception): ...

    def fence() -> None:
        raise Fenced

    namespace, fenced = kubernetes.namespace(), connect(fence=fence)
    body = config_map(namespace)
    body["metadata"]["resourceVersion"] = "1"
    for write in (fenced.create, fenced.update, fenced.apply):
        with pytest.raises(Fenced):
            write(body)
    with pytest.raises(Fenced):
        fenced.delete(CONFIG_MAPS, namespace, "kube-root-ca.crt")
    assert fenced.list(ENCRYPTED_MODELS, namespace) == []


def test_a_replacement_without_a_version_is_no_replacement(admin: Client) -> None:
    with pytest.raises(KeyError, match="resourceVersion"):
        admin.update(config_map("default"))


def test_every_answer_is_counted(kubernetes: Kubernetes, connect: Connect) -> None:
    seen: list[tuple[str, Resource, int]] = []
    counted = connect(count=lambda *call: seen.append(call))
    namespace = kubernetes.namespace()
    counted.create(config_map(namespace))
    with pytest.raises(errors.NotFound):
        counted.get(CONFIG_MAPS, namespace, "other")
    assert seen == [("create", CONFIG_MAPS, 201), ("get", CONFIG_MAPS, 404)]


def test_the_client_logs_no_answer(
    kubernetes: Kubernetes, admin: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """Even with everything on level DEBUG."""
    namespace = kubernetes.namespace()
    with caplog.at_level(logging.DEBUG):
        admin.create(config_map(namespace, word="chrysanthemum"))
        assert admin.get(CONFIG_MAPS, namespace, "settings")["data"] == {"word": "chrysanthemum"}
    assert "chrysanthemum" not in caplog.text


async def test_asyncio_goes_on_while_a_call_waits(kubernetes: Kubernetes, admin: Client) -> None:
    api = Api(admin)
    namespace = kubernetes.namespace()
    await api.create(config_map(namespace, a="1"))
    await api.apply(config_map(namespace, b="2"))
    assert (await api.get(CONFIG_MAPS, namespace, "settings"))["data"]["b"] == "2"
    assert len(await api.list(CONFIG_MAPS, namespace)) == 1
    await api.delete(CONFIG_MAPS, namespace, "settings")
    with pytest.raises(errors.NotFound):
        await api.get(CONFIG_MAPS, namespace, "settings")


def test_no_api_server_configured_says_so(tmp_path: Path) -> None:
    with pytest.raises(errors.SetupError, match="run in a pod, or give a kubeconfig"):
        configuration(tmp_path / "absent")
