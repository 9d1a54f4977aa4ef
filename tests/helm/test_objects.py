"""What the chart's objects have in common: no Secret of ours, kept definitions, pinned images, budgets."""

from __future__ import annotations

import pytest
import yaml
from tests.helm.chart import CRDS, Object, helm, of_kind, pod_templates, rendered

pytestmark = [pytest.mark.real]

DIGEST = f"sha256:{'0' * 64}"
ROLES = ("keysvc", "operator", "materializer", "compute", "client")


def containers(template: Object) -> list[Object]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


def test_secrets_are_only_referred_to(variant: str, objects: list[Object]) -> None:
    """No Secret is made; but by the evaluation profile, each with its label."""
    made = of_kind(objects, "Secret")
    assert bool(made) == (variant == "evaluation")
    assert all(one["metadata"]["labels"]["anamorph.dev/evaluation"] == "true" for one in made)


def test_no_credential_is_in_a_variable(objects: list[Object]) -> None:
    """From Secrets come the store's credentials alone, which no file may give; no other variable is one."""
    given = [
        one
        for _, template in pod_templates(objects)
        for container in containers(template)
        for one in container.get("env", [])
    ]
    secret = {one["name"] for one in given if "secretKeyRef" in one.get("valueFrom", {})}
    assert secret <= {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    plain = {one["name"] for one in given} - secret
    assert not [name for name in plain if any(word in name for word in ("PASSWORD", "TOKEN", "SECRET"))]


def test_definitions_outlive_their_chart() -> None:
    """Models are not deleted with the chart that defined what they are."""
    made = list(yaml.safe_load_all(helm("template", "crds", CRDS, "--kube-version", "1.35.0")))
    definitions = of_kind(made, "CustomResourceDefinition")
    assert len(definitions) == 2
    kept = {one["metadata"]["annotations"]["helm.sh/resource-policy"] for one in definitions}
    assert kept == {"keep"}


def test_images_can_be_pinned() -> None:
    """With digests no pod, no job and no serving cluster has an image by its tag."""
    foreign = {one: {"image": {"digest": DIGEST}} for one in ("postgresql", "vault", "objectStore", "redis")}
    pinned = {"images": {role: {"digest": DIGEST} for role in ROLES}, "evaluation": foreign}
    objects = rendered("evaluation", **pinned)
    images = {one["image"] for _, template in pod_templates(objects) for one in containers(template)}
    [cluster] = of_kind(objects, "ServingCluster")
    [config] = [one for one in of_kind(objects, "ConfigMap") if "operator.yaml" in one.get("data", {})]
    jobs = yaml.safe_load(config["data"]["operator.yaml"])["materializer"]["image"]
    assert {one.partition("@")[2] for one in {*images, cluster["spec"]["ray"]["image"], jobs}} == {DIGEST}


def test_what_has_replicas_has_a_budget(objects: list[Object]) -> None:
    """A node's drain takes one pod at a time where there are several, and never waits for a single one."""
    several = {
        one["metadata"]["name"] for one in of_kind(objects, "Deployment") if one["spec"]["replicas"] > 1
    }
    budgets = {one["metadata"]["name"] for one in of_kind(objects, "PodDisruptionBudget")}
    assert budgets - {"main-workers"} == several


def test_priorities_reach_every_pod() -> None:
    """Of key service and operator each pod has the priority that was chosen, hooks among them."""
    chosen = {one: {"priorityClassName": f"for-{one}"} for one in ("keysvc", "operator")}
    found = {
        template["metadata"]["labels"]["app.kubernetes.io/component"]: template["spec"].get(
            "priorityClassName"
        )
        for _, template in pod_templates(rendered("production", **chosen))
    }
    theirs = dict.fromkeys(("keysvc", "bootstrap", "migration"), "for-keysvc")
    assert found == theirs | dict.fromkeys(("operator", "drain"), "for-operator")
