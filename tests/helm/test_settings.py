"""What the chart writes for key service and operator is what they read."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helm.chart import Object

from anamorph_keysvc import config as configs
from anamorph_keysvc.vault import settings as vault_settings
from anamorph_operator.kubernetes.options import read_options
from anamorph_operator.kubernetes.resources.serving_cluster import ServingClusterSpec, Storage

pytestmark = [pytest.mark.real]


def data(objects: list[Object], name: str, key: str) -> str:
    [found] = [one for one in objects if one["kind"] == "ConfigMap" and one["metadata"]["name"] == name]
    return str(found["data"][key])


def test_the_key_service_reads_its_settings(objects: list[Object], tmp_path: Path) -> None:
    """They are a production configuration, with the operator as the platform and jobs by their own names."""
    file = tmp_path / "keysvc.toml"
    file.write_text(data(objects, "anamorph-keysvc", "keysvc.toml"))
    read = configs.load(file)
    assert read.vault.production
    assert read.identity.kubernetes is not None
    roles = {one.service_account: one.role.value for one in read.identity.kubernetes.bindings}
    assert roles["anamorph-operator"] == "platform"
    assert roles["materializer-*"] == "materializer"


def test_vaults_setup_reads_its_settings(objects: list[Object], variant: str, tmp_path: Path) -> None:
    """The evaluation profile sets Vault up for the key service's own service account and audience."""
    if variant != "evaluation":
        return
    file = tmp_path / "setup.toml"
    file.write_text(data(objects, "anamorph-vault", "setup.toml"))
    setup = vault_settings.load(file).setup.kubernetes
    assert setup is not None
    assert (setup.service_accounts, setup.namespaces, setup.audience) == (
        ("anamorph-keysvc",),
        ("anamorph",),
        "vault",
    )


def test_the_operator_reads_its_settings(objects: list[Object], tmp_path: Path) -> None:
    """It finds key service, namespaces, the jobs' image and the certificates of its clusters."""
    file = tmp_path / "operator.yaml"
    file.write_text(data(objects, "anamorph-operator", "operator.yaml"))
    site = read_options(file)
    assert site.options.keysvc == "https://anamorph-keysvc.anamorph.svc:8400"
    jobs = site.materializer(Storage(uri="s3://replicas/all"))
    assert (jobs.namespace, jobs.audience, jobs.deadline_s) == ("anamorph-jobs", "anamorph-keysvc", 14400)
    assert jobs.image == "localhost/anamorph-materializer:0.1.0"
    assert site.compute.tls_secret == "anamorph-serve-tls"


def test_the_serving_cluster_is_one(objects: list[Object]) -> None:
    """The rendered resource satisfies the typed model."""
    [found] = [one for one in objects if one["kind"] == "ServingCluster"]
    assert ServingClusterSpec.model_validate(found["spec"]).storage.uri.startswith("s3://")
