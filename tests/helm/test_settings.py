"""What the chart writes for key service and operator is what they read."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from tests.helm.chart import Object

from anamorph_keysvc import config as configs
from anamorph_keysvc.vault import settings as vault_settings
from anamorph_operator.kubernetes.resources.serving_cluster import ServingClusterSpec

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


def test_the_operators_settings_are_toml(objects: list[Object]) -> None:
    """Every field of the plan's table is there, and numbers are numbers."""
    read: dict[str, Any] = tomllib.loads(data(objects, "anamorph-operator", "operator.toml"))
    assert read["keysvc"] == "https://anamorph-keysvc.anamorph.svc:8400"
    assert (read["jobs_namespace"], read["compute_namespace"]) == ("anamorph-jobs", "anamorph-compute")
    assert read["jobs"]["audience"] == "anamorph-keysvc"
    assert read["jobs"]["deadline_s"] == 14400


def test_the_serving_cluster_is_one(objects: list[Object]) -> None:
    """The rendered resource satisfies the typed model."""
    [found] = [one for one in objects if one["kind"] == "ServingCluster"]
    assert ServingClusterSpec.model_validate(found["spec"]).storage.uri.startswith("s3://")
