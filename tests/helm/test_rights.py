"""Rights as a real API server sees them: ``kubectl auth can-i`` for every account of the chart."""

from __future__ import annotations

import re

import pytest
from kubernetes import client
from tests.helm.api_server import ZONES, Cluster
from tests.helm.chart import RELEASE, Object, of_kind, rendered

pytestmark = [pytest.mark.real, pytest.mark.slow]

JOBS, COMPUTE, TESTS = "anamorph-jobs", "anamorph-compute", "anamorph-test"
ELSEWHERE = ("default", "kube-system")
NAMESPACES = (*ZONES, TESTS, *ELSEWHERE)
RBAC = ("ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")

Right = tuple[str, str, str]
"""Resource with its group, names of objects (all if empty), verbs in their order."""

EVERYWHERE: dict[str, set[Right]] = {
    "operator": {
        ("encryptedmodels.anamorph.dev", "", "get list patch update watch"),
        ("servingclusters.anamorph.dev", "", "get list patch update watch"),
        ("encryptedmodels.anamorph.dev/status", "", "patch update"),
        ("servingclusters.anamorph.dev/status", "", "patch update"),
        ("namespaces", "", "get list watch"),
        ("events", "", "create"),
    },
    "keysvc": {("tokenreviews.authentication.k8s.io", "", "create")},
    "vault": {("tokenreviews.authentication.k8s.io", "", "create")},
    "drain": {
        ("encryptedmodels.anamorph.dev", "", "list patch"),
        ("servingclusters.anamorph.dev", "", "list patch"),
    },
}
WRITTEN = "create delete get list patch watch"
IN_ONE: dict[tuple[str, str], set[Right]] = {
    ("operator", RELEASE): {
        ("leases.coordination.k8s.io", "", "create"),
        ("leases.coordination.k8s.io", "anamorph-operator", "get patch update"),
    },
    ("operator", JOBS): {
        ("jobs.batch", "", WRITTEN),
        ("configmaps", "", WRITTEN),
        ("serviceaccounts", "", WRITTEN),
        ("persistentvolumeclaims", "", WRITTEN),
        ("pods", "", "get list watch"),
    },
    ("operator", COMPUTE): {
        ("rayservices.ray.io", "", "create delete get list patch update watch"),
        ("rayclusters.ray.io", "", "get list watch"),
        ("pods", "", "get list watch"),
        ("services", "", "get list watch"),
    },
    ("drain", RELEASE): {
        ("deployments.apps", "anamorph-operator", "get patch"),
        ("deployments.apps/scale", "anamorph-operator", "get patch"),
        ("pods", "", "list"),
    },
    ("vault", RELEASE): {("secrets", "anamorph-vault-unseal", "get patch")},
    ("test", TESTS): {
        ("encryptedmodels.anamorph.dev", "", "create"),
        ("encryptedmodels.anamorph.dev", "check", "delete get"),
    },
}
"""All that anybody of the chart may do, beyond what every service account may."""


@pytest.fixture(scope="module")
def ruled(cluster: Cluster) -> Cluster:
    """The evaluation profile's rights, with canary and test, and the account of a tenant's jobs."""
    objects = rendered("evaluation", canary={"enabled": True})
    spaces = [space(name) for name in (TESTS, "nobodys")]
    accounts = [account("materializer-acme", JOBS), *(account("nobody", one) for one in NAMESPACES)]
    done = cluster.kubectl("create", objects=[*spaces, *accounts, *of_kind(objects, *RBAC)])
    assert done.returncode == 0, done.stderr
    return cluster


def space(name: str) -> Object:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


def account(name: str, namespace: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": name, "namespace": namespace},
    }


def named(who: str, namespace: str = RELEASE) -> str:
    return f"system:serviceaccount:{namespace}:{who}"


def rights(cluster: Cluster, user: str, namespace: str) -> set[Right]:
    """What ``kubectl auth can-i --list`` says, less URLs of the API server itself."""
    done = cluster.kubectl("auth", "can-i", "--list", "--no-headers", "--as", user, "--namespace", namespace)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\S*) +\[.*?\] +\[(.*?)\] +\[(.*?)\]$", done.stdout, re.MULTILINE)
    assert len(rows) == len(done.stdout.splitlines())
    checks = {(re.sub("check-.*", "check", names), resource, verbs) for resource, names, verbs in rows}
    return {
        (resource, names, " ".join(sorted(verbs.split()))) for names, resource, verbs in checks if resource
    }


def may(cluster: Cluster, user: str, *question: str) -> bool:
    """The answer to one ``kubectl auth can-i``."""
    done = cluster.kubectl("auth", "can-i", *question, "--as", user)
    assert done.stdout.strip() in {"yes", "no"}, done.stderr
    return done.stdout.strip() == "yes"


ACCOUNTS = ("operator", "keysvc", "canary", "drain", "vault", "test")


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("who", ACCOUNTS)
def test_rights_are_those_that_are_listed(ruled: Cluster, who: str, namespace: str) -> None:
    """In each namespace, no account of the chart may do anything more, nor less."""
    ordinary = rights(ruled, named("nobody", namespace), namespace)
    found = rights(ruled, named(f"anamorph-{who}"), namespace) - ordinary
    assert found == EVERYWHERE.get(who, set()) | IN_ONE.get((who, namespace), set())


def test_jobs_and_ray_may_do_nothing(ruled: Cluster) -> None:
    """Accounts of materialisation jobs, and those that pods of each zone have by default, have no right."""
    accounts = [named("materializer-acme", JOBS), *(named("default", zone) for zone in ZONES)]
    for namespace in NAMESPACES:
        ordinary = rights(ruled, named("nobody", namespace), namespace)
        assert {user for user in accounts if rights(ruled, user, namespace) - ordinary} == set()


@pytest.mark.parametrize("verb", ["get", "list", "watch", "create", "update", "patch", "delete"])
def test_the_operator_has_no_verb_on_secrets(ruled: Cluster, verb: str) -> None:
    """In no namespace at all, not even by the name of one that it has mounted."""
    operator = named("anamorph-operator")
    for namespace in NAMESPACES:
        assert not may(ruled, operator, verb, "secrets", "--namespace", namespace)
        assert not may(ruled, operator, verb, "secrets/ray-token", "--namespace", namespace)
    assert not may(ruled, operator, verb, "secrets", "--all-namespaces")


def test_the_operator_makes_no_pods_beside_the_key_service(ruled: Cluster) -> None:
    """Neither directly nor through anything that makes pods; Jobs it makes in their own namespace."""
    operator = named("anamorph-operator")
    makers = ("pods", "jobs", "cronjobs", "deployments", "statefulsets", "daemonsets", "replicasets")
    for maker in (*makers, "replicationcontrollers", "rayservices.ray.io"):
        assert not may(ruled, operator, "create", maker, "--namespace", RELEASE), maker
    for entrance in ("exec", "attach", "ephemeralcontainers"):
        question = ("create", "pods", f"--subresource={entrance}", "--namespace", RELEASE)
        assert not may(ruled, operator, *question), entrance
    assert may(ruled, operator, "create", "jobs", "--namespace", JOBS)
    assert not may(ruled, operator, "create", "pods", "--namespace", JOBS)


def test_nobody_may_become_somebody_else(ruled: Cluster) -> None:
    """No account may impersonate, give itself rights, or ask for another account's token."""
    grabs = [
        ("impersonate", "serviceaccounts"),
        ("create", "serviceaccounts", "--subresource=token"),
        ("bind", "clusterroles"),
        ("escalate", "roles"),
        ("create", "rolebindings"),
        ("patch", "namespaces"),
    ]
    users = [named(f"anamorph-{who}") for who in ACCOUNTS]
    found = {
        (user, *grab)
        for user in users
        for grab in grabs
        for zone in ZONES
        if may(ruled, user, *grab, "--namespace", zone)
    }
    assert found == set()


def test_a_right_on_secrets_would_be_seen(ruled: Cluster) -> None:
    """The control: an account that is given one is answered yes, and its list shows it."""
    rbac = client.RbacAuthorizationV1Api(ruled.server.admin)
    rules = [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}]
    rbac.create_cluster_role({"metadata": {"name": "reader"}, "rules": rules})
    rbac.create_cluster_role_binding(
        {
            "metadata": {"name": "reader"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "reader"},
            "subjects": [{"kind": "ServiceAccount", "name": "curious", "namespace": "nobodys"}],
        }
    )
    curious = named("curious", "nobodys")
    assert may(ruled, curious, "get", "secrets", "--namespace", RELEASE)
    assert ("secrets", "", "get") in rights(ruled, curious, JOBS)
