"""``helm upgrade`` on a real API server: what stands keeps what cannot change, and says so."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from tests.helm.api_server import Cluster
from tests.helm.chart import CHART, KUBERNETES, PRODUCTION, RELEASE, helm
from tests.servers.find import binary

pytestmark = [pytest.mark.real, pytest.mark.slow]

COMPUTE = "anamorph-compute"
OLD, NEW = "localhost/anamorph-compute:0.1.0", "localhost/anamorph-compute:9.9.9"


def upgraded(cluster: Cluster, folder: Path, **values: object) -> subprocess.CompletedProcess[str]:
    """Helm's answer to an upgrade, or a first installation; nothing here runs its hooks' Jobs."""
    given = folder / "values.json"
    given.write_text(json.dumps({"namespaces": {"create": False}, **values}))
    options = ("--no-hooks", "--namespace", RELEASE, "--kubeconfig", cluster.kubeconfig)
    command = (
        binary("helm"),
        "upgrade",
        "--install",
        RELEASE,
        CHART,
        "-f",
        PRODUCTION,
        "-f",
        given,
        *options,
    )
    return subprocess.run(command, capture_output=True, text=True, check=False)


def image(cluster: Cluster, name: str = "main") -> str:
    path = "jsonpath={.spec.ray.image}"
    return cluster.kubectl("-n", COMPUTE, "get", "servingcluster", name, "-o", path).stdout


@pytest.fixture(scope="module")
def installed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    done = upgraded(cluster, tmp_path_factory.mktemp("first"))
    assert done.returncode == 0, done.stderr
    assert image(cluster) == OLD
    assert "keeps its image" not in done.stdout
    return cluster


def test_an_upgrade_leaves_the_cluster_its_image(installed: Cluster, tmp_path: Path) -> None:
    """The next release's tag is for everything else, and the notes tell how models come to it."""
    done = upgraded(installed, tmp_path, images={"tag": "9.9.9"})
    assert done.returncode == 0, done.stderr
    assert image(installed) == OLD
    assert f"ServingCluster main keeps its image, as a cluster's image never changes: {OLD}" in done.stdout
    operator = ("-n", RELEASE, "get", "deployment", "anamorph-operator", "-o", "yaml")
    assert "localhost/anamorph-operator:9.9.9" in installed.kubectl(*operator).stdout


@pytest.mark.parametrize(
    ("ray", "why"),
    [
        ({"image": NEW}, "a cluster's image never changes: make another ServingCluster"),
        ({"rayVersion": "2.61.0"}, "rayVersion, tokenSecret, redis, autoscaling never change"),
        ({"head": {"resources": {"cpu": "7"}}}, "resources, .* never change: make another ServingCluster"),
    ],
)
def test_what_cannot_change_is_refused_with_the_remedy(
    installed: Cluster, tmp_path: Path, ray: dict[str, object], why: str
) -> None:
    done = upgraded(installed, tmp_path, servingCluster={"spec": {"ray": ray}})
    assert done.returncode != 0
    assert pytest.raises is not None
    assert re.search(why, done.stderr), done.stderr


def test_the_next_cluster_is_made_beside_it_and_taken_over(installed: Cluster, tmp_path: Path) -> None:
    """As the guide has it: it has the release's image, and the one before goes when its name does."""
    named = ("--set", "servingCluster.name=main-2", "--set", "images.tag=9.9.9")
    only = ("--show-only", "templates/serving/servingcluster.yaml")
    asking = ("--dry-run=server", "--kube-version", KUBERNETES, "--kubeconfig", installed.kubeconfig)
    text = helm("template", RELEASE, CHART, "-n", RELEASE, "-f", PRODUCTION, *named, *only, *asking)
    made = installed.kubectl("apply", objects=list(yaml.safe_load_all(text)))
    assert made.returncode == 0, made.stderr
    assert (image(installed), image(installed, "main-2")) == (OLD, NEW)
    owner = [f"meta.helm.sh/release-{one}={RELEASE}" for one in ("name", "namespace")]
    installed.kubectl("-n", COMPUTE, "annotate", "servingcluster", "main-2", *owner)
    done = upgraded(installed, tmp_path, images={"tag": "9.9.10"}, servingCluster={"name": "main-2"})
    assert done.returncode == 0, done.stderr
    assert (image(installed), image(installed, "main-2")) == ("", NEW)
