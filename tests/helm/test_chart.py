"""The chart: Helm and its tools take it, its files are current, its rights are those that are listed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.helm.chart import (
    CHART,
    CHARTS,
    CRDS,
    RELEASE,
    VARIANTS,
    Object,
    helm,
    of_kind,
    options,
    pod_templates,
    rendered,
)
from tests.servers.find import binary

pytestmark = [pytest.mark.real]

# Everything cluster-wide, by who has it.
CLUSTER_WIDE = {
    ("operator", "anamorph.dev", "encryptedmodels", "get list watch patch update"),
    ("operator", "anamorph.dev", "servingclusters", "get list watch patch update"),
    ("operator", "anamorph.dev", "encryptedmodels/status", "patch update"),
    ("operator", "anamorph.dev", "servingclusters/status", "patch update"),
    ("operator", "", "namespaces", "get list watch"),
    ("operator", "", "events", "create"),
    ("keysvc", "authentication.k8s.io", "tokenreviews", "create"),
    ("drain", "anamorph.dev", "encryptedmodels", "list patch"),
    ("drain", "anamorph.dev", "servingclusters", "list patch"),
}
UNSEALED = {("vault", "authentication.k8s.io", "tokenreviews", "create")}


def test_helm_finds_no_fault(variant: str, tmp_path: Path) -> None:
    """``helm lint --strict`` passes in every variant."""
    assert "0 chart(s) failed" in helm("lint", "--strict", CHART, *options(*VARIANTS[variant], tmp_path))


def test_the_charts_crds_lint() -> None:
    """So does the chart of the CRDs."""
    assert "0 chart(s) failed" in helm("lint", "--strict", CRDS, "--kube-version", "1.35.0")


@pytest.mark.slow
def test_suites_of_the_templates() -> None:
    """helm-unittest: every template, and first that it renders nothing when it is off."""
    done = subprocess.run([binary("helm-unittest"), CHART], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_template_has_a_suite_that_begins_with_nothing() -> None:
    """A template without a suite, or one that begins otherwise, is forgotten."""
    suites = [yaml.safe_load(file.read_text()) for file in (CHART / "tests").glob("*_test.yaml")]
    covered = {f"templates/{one}" for suite in suites for one in suite["templates"]}
    templates = {
        file for file in (CHART / "templates").rglob("*") if file.is_file() and file.suffix != ".tpl"
    }
    assert covered == {str(file.relative_to(CHART)) for file in templates}
    # Notes are no object: they are always there.
    first = {suite["suite"]: suite["tests"][0] for suite in suites if suite["templates"] != ["NOTES.txt"]}
    assert {one["it"] for one in first.values()} == {"renders nothing when disabled"}
    assert all(one["asserts"] == [{"hasDocuments": {"count": 0}}] for one in first.values())


def test_what_is_generated_is_current() -> None:
    """CRDs, values schema, dashboards, rules and values table are what the sources say now."""
    binary("helm-docs")
    done = subprocess.run(
        [sys.executable, CHARTS / "generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"run make chart; {done.stdout}{done.stderr}"


def test_every_value_is_described() -> None:
    """No row of the values table is without a description."""
    rows = [line for line in (CHART / "README.md").read_text().splitlines() if line.startswith("| ")]
    assert [row for row in rows if row.endswith("|  |")] == []
    assert sum(row.startswith("| keysvc.") for row in rows) > 30


def test_crds_are_what_the_operator_prints() -> None:
    """Helm renders the generated templates to the very objects."""
    from anamorph_operator.kubernetes.resources import admission
    from anamorph_operator.kubernetes.resources.definition import KINDS, definition

    made = list(yaml.safe_load_all(helm("template", "crds", CRDS, "--kube-version", "1.35.0")))
    wanted = [definition(kind) for kind in KINDS] + [admission.policy(), admission.binding()]
    assert sorted(made, key=json.dumps) == sorted(json.loads(json.dumps(wanted)), key=json.dumps)


def rules(objects: list[Object], kind: str) -> list[tuple[Object, dict[str, Any]]]:
    return [(one, rule) for one in of_kind(objects, kind) for rule in one["rules"]]


def test_nobody_may_touch_secrets(variant: str, objects: list[Object]) -> None:
    """No rule names Secrets, or everything; but the evaluation profile's unsealer, and one Secret."""
    found = [
        (one["metadata"]["name"], rule)
        for kind in ("Role", "ClusterRole")
        for one, rule in rules(objects, kind)
        if {"secrets", "*"} & {*rule["resources"], *rule["verbs"], *rule["apiGroups"]}
    ]
    exception = {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get", "patch"]}
    exception["resourceNames"] = ["anamorph-vault-unseal"]
    assert found == ([("anamorph-vault-unseal", exception)] if variant == "evaluation" else [])


def test_nothing_cluster_wide_that_is_not_listed(variant: str, objects: list[Object]) -> None:
    """Cluster-wide are our own resources, namespaces to read, events to write, and token reviews."""
    found = {
        (one["metadata"]["labels"]["app.kubernetes.io/component"], group, resource, " ".join(rule["verbs"]))
        for one, rule in rules(objects, "ClusterRole")
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert found == (CLUSTER_WIDE | UNSEALED if variant == "evaluation" else CLUSTER_WIDE)


def test_bindings_give_what_is_listed(objects: list[Object]) -> None:
    """Every cluster-wide binding is of a role of the chart, to accounts of the release."""
    own = {one["metadata"]["name"] for one in of_kind(objects, "ClusterRole")}
    bindings = of_kind(objects, "ClusterRoleBinding")
    assert {one["roleRef"]["name"] for one in bindings} == own
    subjects = [subject for one in bindings for subject in one["subjects"]]
    assert {(one["kind"], one["namespace"]) for one in subjects} == {("ServiceAccount", RELEASE)}


def test_the_operators_own_namespace_gives_it_its_lease_alone(objects: list[Object]) -> None:
    """Who may create pods beside the key service could read its Secrets."""
    roles = [one for one in of_kind(objects, "Role") if one["metadata"]["name"] == "anamorph-operator"]
    here = [one for one in roles if one["metadata"]["namespace"] == RELEASE]
    assert {resource for one in here for rule in one["rules"] for resource in rule["resources"]} == {"leases"}
    assert {one["metadata"]["namespace"] for one in roles} == {RELEASE, "anamorph-jobs", "anamorph-compute"}


def test_only_the_key_service_reaches_vault_and_compute_neither(objects: list[Object]) -> None:
    """Of the policies' egress, nothing but the key service's program has Vault's port."""
    found = {
        one["metadata"]["name"]
        for one in of_kind(objects, "NetworkPolicy")
        for rule in one["spec"].get("egress", [])
        for port in rule.get("ports", [])
        if port["port"] == 8200
    }
    assert found in ({"anamorph-keysvc", "anamorph-bootstrap"}, set())


def test_every_pod_of_ours_has_a_policy(objects: list[Object]) -> None:
    """With policies on, no pod of the release's namespace is left out."""
    policies = of_kind(objects, "NetworkPolicy")
    if not policies:
        return
    selected = [one["spec"]["podSelector"].get("matchLabels", {}) for one in policies]
    for name, template in pod_templates(objects):
        labels = template["metadata"]["labels"]
        assert any(match.items() <= labels.items() for match in selected), name


def test_no_pod_has_a_token_that_it_does_not_need(objects: list[Object]) -> None:
    """Only who talks to the API server has a token for it."""
    mounted = {
        template["metadata"]["labels"]["app.kubernetes.io/component"]
        for _, template in pod_templates(objects)
        if template["spec"].get("automountServiceAccountToken", True)
    }
    assert mounted <= {"keysvc", "operator", "drain", "vault", "test"}


def test_values_are_closed() -> None:
    """A misspelt value is refused, wherever it is."""
    misspelt: list[dict[str, Any]] = [
        {"keysvc": {"replica": 2}},
        {"keysvc": {"limits": {"grant_ttl": 1}}},
        {"servingCluster": {"spec": {"ray": {"imagee": "x"}}}},
        {"images": {"keysvc": {"tag": "latest"}}},
        {"evaluation": {"vault": {"resources": {"limit": {}}}}},
    ]
    for changes in misspelt:
        with pytest.raises(AssertionError, match=r"values don't meet the specifications"):
            rendered("production", **changes)


def closed(schema: Any, path: str = "values") -> list[str]:
    """Paths of objects in a schema that admit unknown fields without saying of which kind."""
    if isinstance(schema, list):
        return [fault for one in schema for fault in closed(one, path)]
    if not isinstance(schema, dict):
        return []
    faults = [path] if "properties" in schema and schema.get("additionalProperties") is not False else []
    for key, value in schema.items():
        faults += closed(value, f"{path}.{key}") if key != "required" else []
    return faults


def test_the_schema_is_closed_everywhere() -> None:
    """Wherever the schema knows fields, it admits no others."""
    assert closed(json.loads((CHART / "values.schema.json").read_text())) == []
