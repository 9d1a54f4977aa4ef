"""Pods of a Ray cluster, as KubeRay's templates want them.

What lies in these pods is for anybody who may run code in Ray: no key, no service-account token, and
of the store a credential that may read. KubeRay adds the command, ``/dev/shm``, the token of Ray,
what waits for the head, and probes where there are none.
"""

from __future__ import annotations

import json

from kubernetes.utils.quantity import parse_quantity

from anamorph.serve.cluster.placement import MEMORY
from anamorph_operator.kubernetes.build import pods, ray_volumes
from anamorph_operator.kubernetes.build.materialization import mib
from anamorph_operator.kubernetes.build.pods import Manifest
from anamorph_operator.kubernetes.build.ray_group import Group
from anamorph_operator.kubernetes.resources.serving_cluster import Resources

COMPONENT = "ray"
SERVE_PORT, DASHBOARD_PORT = 8000, 8265
# Of the head's pod: KubeRay makes its Service of them.
_HEAD_PORTS = {"gcs-server": 6379, "dashboard": DASHBOARD_PORT, "client": 10001}


def start_params(group: Group) -> dict[str, str]:
    """``rayStartParams``: what Ray takes its pods to have. KubeRay makes a command line of them."""
    resources, params = group.pod.resources, {}
    if group.head:
        params["dashboard-host"] = "0.0.0.0"  # noqa: S104 - other pods ask it, with Ray's token
    params["num-cpus"] = str(group.pod.logical_cpus or _cpus(resources.cpu)) if group.computes else "0"
    params["num-gpus"] = str(resources.gpus) if group.computes else "0"
    custom = _custom_resources(group)
    if custom:
        params["resources"] = f"'{json.dumps(custom, sort_keys=True)}'"  # through a shell
    return params


def _custom_resources(group: Group) -> dict[str, int]:
    found: dict[str, int] = {}
    if group.computes and group.pod.replica_memory is not None:
        found[MEMORY] = mib(group.pod.replica_memory)
    if group.computes and group.pod.accelerator is not None:
        # The name by which Ray itself asks for a kind of device.
        found[f"accelerator_type:{group.pod.accelerator}"] = 1
    return found


def _cpus(quantity: str) -> int:
    """Whole CPUs, at least one: Ray counts none that are not whole."""
    return max(1, int(parse_quantity(quantity)))


def template(group: Group) -> Manifest:
    """The pod template of a group."""
    spec = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pods.pod_security(),
        "imagePullSecrets": [{"name": secret} for secret in group.compute.pull_secrets],
        "priorityClassName": group.pod.priority_class_name,
        "nodeSelector": dict(group.pod.node_selector),
        "tolerations": [one.manifest() for one in group.pod.tolerations],
        "initContainers": ray_volumes.certificate(group),
        "containers": [_container(group)],
        "volumes": ray_volumes.volumes(group),
    }
    labels = pods.labels(COMPONENT, **{pods.CLUSTER: group.cluster})
    return {"metadata": {"labels": labels}, "spec": pods.present(spec)}


def autoscaler(group: Group) -> Manifest:
    """``autoscalerOptions``."""
    return {
        "version": "v2",
        "idleTimeoutSeconds": 300,
        "securityContext": pods.container_security(),
        "env": pods.variables({"HOME": ray_volumes.TMP, **ray_volumes.tls_env(group)}),
        "volumeMounts": ray_volumes.autoscaler_mounts(group),
    }


def _container(group: Group) -> Manifest:
    ports = {**(_HEAD_PORTS if group.head else {}), "serve": SERVE_PORT}
    container = {
        "name": "ray",
        "image": group.ray.image,
        "imagePullPolicy": group.compute.pull_policy,
        "env": _env(group),
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        "resources": _resources(group.pod.resources),
        "securityContext": pods.container_security(),
        "volumeMounts": ray_volumes.mounts(group),
        "readinessProbe": None if group.head else _answers(group),
    }
    return pods.present(container)


def _env(group: Group) -> list[Manifest]:
    values = {
        "HOME": ray_volumes.TMP,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's own text errors leave the proxy in OpenAI's shape.
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "anamorph.serve.cluster.proxy:middlewares",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **({} if group.compute.tls_secret is None else {"ANAMORPH_SERVE_TLS": ray_volumes.TLS}),
        **ray_volumes.tls_env(group),
        **group.compute.env,
    }
    return pods.variables(values) + pods.store_env(group.storage, group.compute.ca_config_map)


def _resources(resources: Resources) -> Manifest:
    limits = {"memory": resources.memory}
    if resources.gpus:
        limits[resources.gpu_resource] = str(resources.gpus)
    # A limit of CPUs would hold a process up that the node has time for.
    return {"requests": {"cpu": resources.cpu, **limits}, "limits": limits}


def _answers(group: Group) -> Manifest:
    """A worker takes requests while its proxy answers; KubeRay's own probe knows no HTTPS."""
    scheme = "HTTP" if group.compute.tls_secret is None else "HTTPS"
    asked = {"path": "/-/healthz", "port": SERVE_PORT, "scheme": scheme}
    return {"httpGet": asked, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 2}
