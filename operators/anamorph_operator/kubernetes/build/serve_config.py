"""``serveConfigV2``: what KubeRay puts to Serve, always the whole list.

It is written as JSON, which is YAML too: a thousand applications must fit one object of etcd.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from anamorph.wire.serving import Cache, DoorState
from anamorph_operator.applications import DOOR
from anamorph_operator.kubernetes.build import ray_volumes
from anamorph_operator.kubernetes.build.ray_group import Compute
from anamorph_operator.kubernetes.build.ray_pods import DASHBOARD_PORT, SERVE_PORT
from anamorph_operator.kubernetes.resources.serving_cluster import ServingClusterSpec
from anamorph_operator.ray_serve import as_config
from anamorph_operator.state import Application

FIRST = (Application(DOOR, "/", None, DoorState()),)
"""What is served before anything is known: a cluster without applications never becomes ready."""


def serve_config(spec: ServingClusterSpec, compute: Compute, applications: Iterable[Application]) -> str:
    """The list as KubeRay takes it; the same applications in the same order give the same text."""
    body = {
        "proxy_location": "EveryNode" if workers(spec) else "HeadOnly",
        "http_options": http_options(compute),
        "applications": [as_config(application) for application in applications],
    }
    return json.dumps(body, sort_keys=True, separators=(",", ":"))


def http_options(compute: Compute) -> dict[str, Any]:
    """How Serve listens; fixed when it starts."""
    options: dict[str, Any] = {"host": "0.0.0.0", "port": SERVE_PORT}  # noqa: S104 - in a pod
    if compute.tls_secret is not None:
        options |= {
            "ssl_certfile": f"{ray_volumes.TLS}/tls.crt",
            "ssl_keyfile": f"{ray_volumes.TLS}/tls.key",
        }
    return options


def workers(spec: ServingClusterSpec) -> bool:
    """Whether replicas and proxies are on workers, and not on the head."""
    return spec.ray is not None and bool(spec.ray.worker_groups)


def cache(spec: ServingClusterSpec) -> Cache:
    """The replicas that a pod keeps: in its volume, where pods are ours."""
    folder = None if spec.ray is None else ray_volumes.REPLICAS
    return Cache(folder=folder, limit_bytes=spec.cache_bytes)


def serve_url(name: str, spec: ServingClusterSpec, compute: Compute) -> str:
    """Where Serve listens, as seen from another pod.

    Workers answer behind KubeRay's Service for Serve. A head that is alone is asked by the head's own:
    KubeRay takes it into the other only after a probe that knows no HTTPS.
    """
    if spec.existing is not None:
        return spec.existing.serve_url
    scheme = "http" if compute.tls_secret is None else "https"
    service = "serve" if workers(spec) else "head"
    return f"{scheme}://{name}-{service}-svc.{compute.namespace}.svc:{SERVE_PORT}"


def dashboard_url(name: str, spec: ServingClusterSpec, compute: Compute) -> str:
    """Ray's dashboard, as seen from another pod."""
    if spec.existing is not None:
        return spec.existing.dashboard_url
    return f"http://{name}-head-svc.{compute.namespace}.svc:{DASHBOARD_PORT}"
