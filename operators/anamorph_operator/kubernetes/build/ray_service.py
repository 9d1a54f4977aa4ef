"""The RayService of a serving cluster, for KubeRay 1.6.

Written by server-side apply. Its pods and its list of applications have two writers, with field
managers of their own: the first never takes away what the second wrote.
"""

from __future__ import annotations

from anamorph_operator.kubernetes.build import pods, ray_pods
from anamorph_operator.kubernetes.build.pods import Manifest
from anamorph_operator.kubernetes.build.ray_group import Compute, Group, groups
from anamorph_operator.kubernetes.build.serve_config import workers
from anamorph_operator.kubernetes.resources.serving_cluster import (
    Redis,
    ServingClusterSpec,
    WorkerGroup,
)

API_VERSION, KIND = "ray.io/v1", "RayService"


def ray_service(name: str, spec: ServingClusterSpec, compute: Compute, config: str | None = None) -> Manifest:
    """The RayService of a cluster.

    Args:
        name: of the serving cluster, and of the RayService.
        spec: of the serving cluster.
        compute: what all Ray clusters have in common.
        config: ``serveConfigV2`` for the first write; absent in later ones, which leave the list alone.

    Raises:
        ValueError: the cluster is there already, and none of our making.
    """
    whole = {
        # Another cluster of full size beside this one is never what a change means.
        "upgradeStrategy": {"type": "None"},
        "excludeHeadPodFromServeSvc": workers(spec),
        "rayClusterConfig": _cluster(groups(name, spec, compute)),
        "serveConfigV2": config,
    }
    return _object(name, compute, pods.present(whole))


def applications_of(name: str, compute: Compute, config: str) -> Manifest:
    """The list of applications alone, for the field manager that writes nothing else."""
    return _object(name, compute, {"serveConfigV2": config})


def _object(name: str, compute: Compute, spec: Manifest) -> Manifest:
    labels = pods.labels(ray_pods.COMPONENT, **{pods.CLUSTER: name})
    metadata = {"name": name, "namespace": compute.namespace, "labels": labels}
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": spec}


def _cluster(of: tuple[Group, ...]) -> Manifest:
    head, *workers = of
    ray = head.ray
    cluster = {
        "rayVersion": ray.ray_version,
        "authOptions": {"mode": "token", "secretName": ray.token_secret},
        "gcsFaultToleranceOptions": None if ray.redis is None else _fault_tolerance(ray.redis),
        "enableInTreeAutoscaling": ray.autoscaling or None,
        "autoscalerOptions": ray_pods.autoscaler(head) if head.scales else None,
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "rayStartParams": ray_pods.start_params(head),
            "template": ray_pods.template(head),
        },
        "workerGroupSpecs": [_workers(group) for group in workers],
    }
    return pods.present(cluster)


def _workers(group: Group) -> Manifest:
    pod = group.pod
    assert isinstance(pod, WorkerGroup)  # noqa: S101 - groups() makes no other
    most = pod.max_replicas if group.ray.autoscaling else None
    return {
        "groupName": pod.name,
        "replicas": pod.replicas,
        "minReplicas": pod.replicas,
        "maxReplicas": pod.replicas if most is None else most,
        "rayStartParams": ray_pods.start_params(group),
        "template": ray_pods.template(group),
    }


def _fault_tolerance(redis: Redis) -> Manifest:
    found: Manifest = {"redisAddress": redis.address}
    if redis.password_secret is not None:
        reference = {"name": redis.password_secret, "key": "password"}
        found["redisPassword"] = {"valueFrom": {"secretKeyRef": reference}}
    return found
