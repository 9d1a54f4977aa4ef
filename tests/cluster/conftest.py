"""The cluster, and the walk through the guide on it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from tests.cluster.cluster import Cluster
from tests.cluster.conversation import client
from tests.cluster.guide import FROM_ELSEWHERE, step, walk
from tests.cluster.shell import Shell, shell

ROOT = Path(__file__).parents[2]
# Seconds for one step: a machine with two cores folds, loads and verifies two models in one of them.
PATIENCE_S = 1500
# In the folder of a walk that another run may go on from, on the same cluster.
WALKED = "walked"


@dataclass(frozen=True)
class Walk:
    """The guide's steps, in one shell.

    Args:
        work: the folder that the guide calls ``$WORK``.
    """

    shell: Shell
    work: Path
    charts: Path

    def take(self, title: str) -> str:
        """Do a step of the guide as it stands; what it printed."""
        if title == FROM_ELSEWHERE:
            return self._images()
        return self.shell.run(step(title).script, PATIENCE_S)

    def take_until(self, title: str) -> None:
        """Do every step before the one of this title, in the guide's order."""
        for one in walk()[: step(title).number - 1]:
            self.take(one.title)

    def _images(self) -> str:
        """Images are on the node already; KubeRay's chart is told of its own."""
        ours = yaml.safe_load((ROOT / "tests" / "cluster" / "values.yaml").read_text())
        (self.work / "images.yaml").write_text(yaml.safe_dump(ours))
        chart = self.work / "kuberay-operator"
        shutil.copytree(self.charts, chart)
        values = yaml.safe_load((chart / "values.yaml").read_text())
        servers = ours["evaluation"]["redis"]["image"]
        values["image"] = {**servers, "pullPolicy": "Never"}
        (chart / "values.yaml").write_text(yaml.safe_dump(values))
        return ""

    @property
    def proxy(self) -> str:
        """Where the guide's proxy listens."""
        return f"http://127.0.0.1:{(self.work / 'proxy.port').read_text().strip()}/v1"

    def ask(self) -> str:
        """The answer to the guide's question, through its proxy."""
        from tests.cluster.conversation import ask

        with client(self.proxy) as one:
            return ask(one).strip()


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    if os.environ.get("ANAMORPH_TEST_CLUSTER") != "1" or not os.environ.get("KUBECONFIG"):
        pytest.skip(
            "needs a cluster of its own: KUBECONFIG, and ANAMORPH_TEST_CLUSTER=1; see make test-cluster"
        )
    for program in ("kubectl", "helm", "anamorph"):
        assert shutil.which(program), f"{program} must be on PATH"
    return Cluster(Path(os.environ["KUBECONFIG"]))


@pytest.fixture(scope="session")
def guide(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    """The walk, not begun; what it has started ends with it."""
    charts = Path(os.environ.get("ANAMORPH_TEST_KUBERAY", "kuberay-operator"))
    assert (charts / "Chart.yaml").exists(), "ANAMORPH_TEST_KUBERAY must name the folder of KubeRay's chart"
    kept = os.environ.get("ANAMORPH_TEST_KEEP")
    work = tmp_path_factory.mktemp("walk") if not kept else Path(kept)
    if not (work / WALKED).exists():
        work.mkdir(parents=True, exist_ok=True)
        assert not any(work.iterdir()), f"{work} is of a walk that came to no end: empty it"
    environment = {**os.environ, "WORK": str(work), "KUBECONFIG": str(cluster.kubeconfig)}
    assert walk()
    with shell(ROOT, environment) as bash:
        yield Walk(bash, work, charts)
