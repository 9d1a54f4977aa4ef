"""What ``helm test`` runs, against a real API server and a real key service; all of it runs in a cluster."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from kubernetes import client
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from tests.helm.api_server import TESTS, Cluster
from tests.helm.chart import RELEASE, Object, of_kind, rendered
from tests.helm.scripts import script
from tests.servers.asgi import serving
from tests.servers.process import Program, free_port

from anamorph.wire.keyservice import KeyService, everything

pytestmark = [pytest.mark.real, pytest.mark.slow]

GROUP, VERSION, PLURAL = "anamorph.dev", "v1alpha1", "encryptedmodels"


@pytest.fixture(scope="module")
def settings(cluster: Cluster) -> Object:
    """What the test's pod is told; its account, rights and namespace are as the chart makes them."""
    objects = rendered("evaluation")
    ours = [one for one in objects if one["metadata"]["name"] in ("anamorph-test", TESTS)]
    given = of_kind(ours, "Namespace", "ServiceAccount", "Role", "RoleBinding")
    done = cluster.kubectl("apply", "--server-side", "--force-conflicts", objects=given)
    assert done.returncode == 0, done.stderr
    [config] = of_kind(ours, "ConfigMap")
    read: Object = json.loads(config["data"]["check.json"])
    return read


@pytest.fixture
def resource(cluster: Cluster, settings: Object) -> Iterator[Any]:
    """The test's model, made with the credential of the test's own account."""
    token = cluster.server.token(RELEASE, "anamorph-test")
    trusted = ssl.create_default_context(cafile=cluster.server.ca_file)
    with httpx.Client(base_url=cluster.server.url, verify=trusted, trust_env=False) as api:
        made = script("check").Resource(api, lambda: token, settings["model"], sleep=lambda _: None)
        yield made
        made.delete()


def report(cluster: Cluster, name: str, status: str, message: str) -> None:
    """Say of the model what the operator would."""
    reason = "Running" if status == "True" else "NoRoom"
    condition: Object = {"type": "Ready", "status": status, "reason": reason, "message": message}
    condition |= {"lastTransitionTime": "2026-01-01T00:00:00Z", "observedGeneration": 1}
    client.CustomObjectsApi(cluster.server.admin).patch_namespaced_custom_object_status(
        GROUP, VERSION, TESTS, PLURAL, name, {"status": {"conditions": [condition]}}
    )


def test_the_model_is_waited_for(cluster: Cluster, resource: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """With no right but those of its Role it makes the model, follows its conditions, and takes it away."""
    resource.create()
    name = resource.body["metadata"]["name"]
    report(cluster, name, "False", "no room")
    later = threading.Timer(1, report, (cluster, name, "True", "it runs"))
    later.start()
    resource.ready(120)
    later.join()
    said = capsys.readouterr().out.splitlines()
    assert said == ["  Ready=False (NoRoom)", "  Ready=True (Running)"]
    resource.delete()
    assert resource.read() is None


def test_what_is_not_in_time_says_why(cluster: Cluster, resource: Any) -> None:
    """The end of waiting names the conditions that do not hold."""
    resource.create()
    report(cluster, resource.body["metadata"]["name"], "False", "no room")
    with pytest.raises(SystemExit, match="not Ready within 0 s: Ready: NoRoom: no room"):
        resource.ready(0)


def test_what_an_earlier_run_left_goes_first(resource: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A second creation takes the first one's place."""
    resource.create()
    first = resource.read()["metadata"]["uid"]
    resource.create()
    assert resource.read()["metadata"]["uid"] != first
    assert "an earlier run has left its model" in capsys.readouterr().out


def test_the_test_may_not_use_anothers_tenant(resource: Any) -> None:
    """Its namespace is bound to its own tenant."""
    body = {**resource.body, "spec": {**resource.body["spec"], "tenant": "acme"}}
    resource.body = body
    with pytest.raises(SystemExit, match=r"anamorph\.dev/tenants"):
        resource.create()


def test_the_test_asks_the_cluster_by_its_service() -> None:
    """Outside another address may be told, which no pod can reach."""
    seen: list[tuple[str, str]] = []

    async def app(request: Request) -> Response:
        seen.append((request.url.path, request.headers["host"]))
        return Response("yes")

    with serving(Starlette(routes=[Route("/{path:path}", app)])) as url:
        with httpx.Client(transport=script("check").Inside(url)) as http:
            assert http.get("https://models.example.com/acme/chat/v1").text == "yes"
        assert seen == [("/acme/chat/v1", url.removeprefix("http://"))]


@pytest.fixture
def keysvc(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """URL of a key service, and the file with its platform's key."""
    home, port = tmp_path / "home", free_port()
    program = [sys.executable, "-m", "anamorph_keysvc.main"]
    subprocess.run([*program, "init", "--home", home], check=True, capture_output=True)
    server = Program([*program, "serve", "--home", str(home), "--port", str(port)], tmp_path / "keysvc.log")
    url = f"http://127.0.0.1:{port}"
    server.start(lambda: answers(f"{url}/livez"))
    yield url, home / "platform-admin.key"
    server.stop()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, timeout=5).is_success
    except httpx.TransportError:
        return False


def test_commands_leave_no_key_behind(keysvc: tuple[str, Path], tmp_path: Path) -> None:
    """The tenant is made once; each run has API keys of its own, which end with it, also after a failure."""
    url, platform = keysvc
    platform.chmod(0o440)  # as a projected volume has it
    work = tmp_path / "work"
    work.mkdir()
    for _ in range(2):
        commands = script("check").Commands(url, "http://serve", "helm-test", platform, work)
        with pytest.raises(SystemExit, match="anamorph key rotate"), commands:
            commands.rotate("nothing", 1)
    with KeyService(url, platform.read_text().strip()) as keys:
        found = list(everything(keys.list_api_keys, "helm-test"))
    assert sorted(one.role.value for one in found) == ["admin", "admin", "client", "client"]
    assert all(one.revoked_at is not None for one in found)


def test_answers_are_compared() -> None:
    """Passed is another key, other ids on the wire and the same answer; nothing else."""
    check = script("check")
    first = check.Answer("t.m.v1.a", [5, 6], [1, 2])
    check.compare(first, check.Answer("t.m.v2.b", [7, 8], [1, 2]))
    wrong = {
        "changed nothing": [
            check.Answer("t.m.v1.a", [7, 8], [1, 2]),
            check.Answer("t.m.v2.b", [5, 6], [1, 2]),
        ],
        "answers differ": [check.Answer("t.m.v2.b", [7, 8], [1, 3])],
    }
    for message, answers in wrong.items():
        for answer in answers:
            with pytest.raises(SystemExit, match=message):
                check.compare(first, answer)
