"""The product on a real cluster, along the guide: each test goes on where the one before has ended."""

from __future__ import annotations

import base64
import os
import time
from functools import partial
from pathlib import Path

import openai
import pytest
from tests.cluster import networks
from tests.cluster.cluster import COMPUTE, JOBS, RELEASE, ZONES, Cluster, condition, until
from tests.cluster.conftest import Walk
from tests.cluster.conversation import RIGHT, asking, client
from tests.cluster.grid import Fault
from tests.cluster.secrets import hits, spellings
from tests.cluster.strikes import PODS, kill

from anamorph.wire.keyservice import KeyService

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
UPGRADE = (
    "helm upgrade anamorph helm/anamorph -n anamorph --timeout 10m -f helm/anamorph/values-evaluation.yaml "
    '-f "$WORK/images.yaml" --set servingCluster.spec.publicUrl=https://127.0.0.1:8000 '
    "--set tests.enabled=true"
)
ACME, GLOBEX = "team-acme", "team-globex"
# Seconds until a rotation must have come to its end on a machine with two cores.
ROTATION_S = 600
# Seconds until nothing that a revoked key began goes on.
REVOKE_S = 10


def test_from_an_empty_cluster_to_the_first_answer(guide: Walk) -> None:
    """The guide as it stands, up to the question that the openai client asks outside the pods."""
    guide.take_until("The first answer")
    assert guide.take("The first answer").strip().splitlines()[-1] == RIGHT


def test_the_chart_tests_itself(guide: Walk) -> None:
    """helm test issues a key, encrypts, infers, rotates, and takes its tenant away."""
    test = "helm test anamorph -n anamorph --logs --timeout 30m"
    printed = guide.shell.run(f"{UPGRADE}\n{test}", 1800)
    assert "Phase:          Succeeded" in printed


def test_networks_are_as_the_table_says(cluster: Cluster, guide: Walk) -> None:
    """Each way is tried; each that is barred is open where there are no policies."""
    assert guide.proxy
    with networks.outside(cluster) as beyond:
        targets = {**networks.TARGETS, **beyond}
        probers = networks.probers(cluster, ACME)
        try:
            found = {name: one.reached(cluster, targets) for name, one in probers.items()}
            assert found == dict(networks.MAY)
            with networks.no_policies(cluster):
                until(
                    lambda: all(one.reached(cluster, targets) == set(targets) for one in probers.values()),
                    "everything reaches everything without policies",
                    60,
                )
        finally:
            networks.remove_probers(cluster, ACME)


def test_a_rotation_under_load_is_not_noticed(cluster: Cluster, guide: Walk) -> None:
    """By the policy, by the admin API and by an annotation, as the guide does it."""
    before = cluster.active(ACME)
    with asking(guide.proxy) as said:
        guide.take("Rotate")
    assert (said.wrong, dict(said.failed)) == ([], {}), said
    assert said.right > 10
    assert cluster.active(ACME) >= before + 3


def test_every_pod_may_go_once(cluster: Cluster, guide: Walk) -> None:
    """One after the other; what was there is there again, and answers."""
    keys = guide.shell.run("anamorph key list acme smol --json; anamorph tenant list --json", 60)
    for namespace in ZONES:
        for pod in cluster.pods(namespace):
            name = pod["metadata"]["name"]
            cluster.kubectl("delete", "pod", "-n", namespace, name, "--timeout=180s")
            until(partial(cluster.ready, namespace), f"all of {namespace} after {name}", 300)
    until(lambda: answers(guide), "an answer", 300)
    assert guide.shell.run("anamorph key list acme smol --json; anamorph tenant list --json", 60) == keys


def test_a_rotation_outlives_whoever_works_on_it(cluster: Cluster, guide: Walk) -> None:
    """Operator, Job, key service, Vault (sealed), Ray's head and a worker: each is lost once at work."""
    version = cluster.rotate(ACME)
    until(lambda: bool(cluster.pods(JOBS)), "a Job", 120)
    for fault in (Fault.OPERATOR, Fault.JOB, Fault.KEY_SERVICE):
        kill(cluster, *PODS[fault])
    kill(cluster, RELEASE, "app.kubernetes.io/component=vault")  # sealed until its unsealer has seen it
    until(lambda: cluster.active(ACME) == version, f"version {version}", ROTATION_S)
    version = cluster.rotate(ACME)
    until(lambda: condition(cluster.model(ACME), "Rotating")[0] == "True", "it begins", 120)
    kill(cluster, *PODS[Fault.HEAD])
    until(lambda: cluster.active(ACME) == version, f"version {version}", ROTATION_S)
    version = cluster.rotate(ACME)
    until(lambda: condition(cluster.model(ACME), "Rotating")[0] == "True", "it begins", 120)
    kill(cluster, *PODS[Fault.WORKER])
    until(lambda: cluster.active(ACME) == version, f"version {version}", ROTATION_S)
    until(lambda: answers(guide), "an answer", 300)


def test_keys_are_nowhere(cluster: Cluster, guide: Walk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the root of a version nor what clients hold: objects, logs, environments, etcd's files."""
    etcd = Path(os.environ.get("ANAMORPH_TEST_ETCD", ""))
    assert etcd.is_dir(), "ANAMORPH_TEST_ETCD must name etcd's data folder"
    assert spellings(b"\x00\x01canary").search(b"x AAFjYW5hcnk= y")
    url, trust = guide.shell.run('echo "$ANAMORPH_KEYSVC_URL"; echo "$ANAMORPH_CA_FILE"', 10).split()
    monkeypatch.setenv("ANAMORPH_CA_FILE", trust)
    scale = ("scale", "-n", RELEASE, "deployment/anamorph-operator")
    cluster.kubectl(*scale, "--replicas=0")
    until(lambda: not cluster.pods(RELEASE, "app.kubernetes.io/component=operator"), "no operator", 120)
    version = cluster.active(ACME) + 1
    guide.shell.run('anamorph key rotate acme smol --api-key-file "$WORK/acme-admin.key"', 60)
    root = root_of(url, guide.work / "platform-admin.key", version)
    cluster.kubectl(*scale, "--replicas=1")
    until(lambda: cluster.active(ACME) == version, f"version {version}", ROTATION_S)
    with KeyService(url, guide.work / "acme-client.key") as keys:
        held = keys.release("acme", "smol", version, "client").secret
    assert held
    planted = os.urandom(32)
    cluster.kubectl("create", "configmap", "-n", ACME, "planted", f"--from-literal=x={planted.hex()}")
    found = hits(cluster, etcd, [planted])
    assert any(one.startswith("etcd") for one in found)
    assert "objects configmaps" in found
    assert hits(cluster, etcd, [root, base64.b64decode(held)]) == []


def root_of(url: str, key: Path, version: int) -> bytes:
    """What the Job of a version will be given: by a grant that the Job's own makes void."""
    with KeyService(url, key) as keys:
        until(lambda: keys.get_version("acme", "smol", version).key_id is not None, "a key", 60)
        grant = keys.materialize("acme", "smol", version).secret
    with KeyService(url, grant) as keys:
        secret = keys.release("acme", "smol", version, "materialize").secret
    assert secret
    return base64.b64decode(secret)


def test_a_revoked_key_ends_within_ten_seconds(cluster: Cluster, guide: Walk) -> None:
    """Its streams are cut, and its application goes; then the guide brings another version."""
    guide.shell.run(
        'anamorph proxy --keysvc "$ANAMORPH_KEYSVC_URL" --tenant globex --model smol="$BASE" --port 8601 '
        '--api-key-file "$WORK/globex-client.key" > "$WORK/globex.log" 2>&1 &\nsleep 10',
        60,
    )
    with client("http://127.0.0.1:8601/v1") as globex:
        stream = globex.chat.completions.create(
            model="smol",
            messages=[{"role": "user", "content": "Count to a thousand, one number a line."}],
            max_completion_tokens=1500,
            stream=True,
        )
        next(iter(stream))
        version, begun = cluster.active(GLOBEX), time.monotonic()
        revoke = f"anamorph key revoke globex smol {version} --yes"
        guide.shell.run(f'{revoke} --api-key-file "$WORK/globex-admin.key"', 60)
        with pytest.raises(openai.APIError):
            list(stream)
        assert time.monotonic() - begun < REVOKE_S
    gone = "kubectl -n team-globex wait encryptedmodel/smol --for=condition=Ready=false --timeout=60s"
    guide.shell.run(gone, 60)


def test_upgrade_and_rollback(guide: Walk) -> None:
    """With other values, and back; answers go on."""
    with asking(guide.proxy, 1) as said:
        guide.shell.run(
            f"{UPGRADE} --set operator.intervalSeconds=3\n"
            "helm rollback anamorph -n anamorph --timeout 10m\n"
            "kubectl -n anamorph rollout status deployment/anamorph-operator --timeout=5m",
            1200,
        )
    assert (said.wrong, dict(said.failed)) == ([], {}), said
    assert said.right


def test_delete_and_uninstall_keep_what_the_guide_says(cluster: Cluster, guide: Walk) -> None:
    guide.take("Revoke")
    guide.take("Delete")
    guide.take("Uninstall")
    assert cluster.get("encryptedmodels", "-A")["items"] == []
    claims = {one["metadata"]["name"] for one in cluster.get("pvc", "-n", RELEASE)["items"]}
    assert {one.split("-")[2] for one in claims} >= {"postgresql", "vault", "objectstore"}
    assert cluster.get("namespace", COMPUTE)
    assert cluster.get("crd", "encryptedmodels.anamorph.dev")


def answers(guide: Walk) -> bool:
    """Whether the guide's question is answered; its ports are forwarded anew after their pods have ended."""
    try:
        return guide.ask() == RIGHT
    except openai.APIError:
        return False
