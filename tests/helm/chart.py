"""The chart rendered by Helm itself, in its variants."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import yaml
from tests.servers.find import binary

CHARTS = Path(__file__).parents[2] / "helm"
CHART, CRDS = CHARTS / "anamorph", CHARTS / "anamorph-crds"
PRODUCTION = CHART / "ci" / "production-values.yaml"
EVALUATION = CHART / "values-evaluation.yaml"
RELEASE = "anamorph"
KUBERNETES = "1.35.0"

Object = dict[str, Any]

_TESTS = {
    "enabled": True,
    "model": {"base": {"uri": "s3://bases/smol"}, "vocabSize": 49152, "contextLength": 2048},
}
_API_SERVER = {"networkPolicies": {"apiServer": {"cidrs": ["172.31.0.1/32"]}}}
_ROUTES = {
    "inference": {"host": "models.example.com", "tlsSecret": "models-tls"},
    "admin": {"host": "keys.example.com", "tlsSecret": "keys-tls"},
}
VARIANTS: dict[str, tuple[Path, Object]] = {
    "production": (PRODUCTION, {}),
    "evaluation": (EVALUATION, {**_API_SERVER, "tests": _TESTS}),
    "everything": (
        PRODUCTION,
        {
            "tls": {"source": "certManager", "certManager": {"issuerRef": {"name": "ca"}}},
            "canary": {"enabled": True, "baselines": {"chat": "twin"}},
            "monitoring": {one: {"enabled": True} for one in ("serviceMonitor", "rules", "dashboards")},
            "routes": {
                **_ROUTES,
                "ingress": {"enabled": True, "className": "nginx"},
                "gateway": {"enabled": True, "parentRefs": [{"name": "public", "sectionName": "https"}]},
            },
            "tests": _TESTS,
            "keysvc": {
                "audit": {"destination": "s3://audit/all", "credentialsSecret": "audit"},
                "limits": {"grant_ttl_s": 600, "backup_retention_s": 3024000},
                "webhooks": {"allow_private": ["10.9.0.0/16"]},
                "identity": {
                    "oidc": [
                        {
                            "name": "corp",
                            "issuer": "https://login.example.com",
                            "audiences": ["anamorph-keysvc"],
                            "tenant": "acme",
                            "roles_claim": ["groups"],
                            "roles": {"keys": "admin"},
                        }
                    ]
                },
            },
        },
    ),
    "existing Ray, no policies": (
        PRODUCTION,
        {
            "networkPolicies": {"enabled": False},
            "servingCluster": {
                "spec": {
                    "ray": None,
                    "existing": {"dashboardUrl": "https://ray:8265", "serveUrl": "https://ray:8000"},
                }
            },
        },
    ),
}


def helm(*arguments: str | Path) -> str:
    """What Helm prints.

    Raises:
        AssertionError: it fails; with what it says.
    """
    done = subprocess.run([binary("helm"), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or done.stdout
    return done.stdout


def options(values: Path, changes: Object, folder: Path) -> list[str]:
    more = folder / "values.yaml"
    more.write_text(yaml.safe_dump(changes))
    return [
        "--namespace",
        RELEASE,
        "--values",
        str(values),
        "--values",
        str(more),
        "--kube-version",
        KUBERNETES,
    ]


def rendered(variant: str, **changes: Any) -> list[Object]:
    """Every object of a variant, hooks among them."""
    values, more = VARIANTS[variant]
    with tempfile.TemporaryDirectory() as folder:
        text = helm("template", RELEASE, CHART, *options(values, {**more, **changes}, Path(folder)))
    return [one for one in yaml.safe_load_all(text) if one]


def pod_templates(objects: list[Object]) -> list[tuple[str, Object]]:
    """Name and template of everything that makes pods."""
    makers = {"Deployment", "StatefulSet", "Job", "DaemonSet"}
    found = [(one["metadata"]["name"], one["spec"]["template"]) for one in objects if one["kind"] in makers]
    bare = [(one["metadata"]["name"], one) for one in objects if one["kind"] == "Pod"]
    return found + bare


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [one for one in objects if one["kind"] in kinds]
