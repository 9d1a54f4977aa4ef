"""What pods of Ray can write to, and what they hold: certificates, and no key of any tenant."""

from __future__ import annotations

from typing import Any

from anamorph_operator.kubernetes.build import pods
from anamorph_operator.kubernetes.build.pods import Manifest
from anamorph_operator.kubernetes.build.ray_group import Group

TMP = "/tmp"  # noqa: S108 - a volume of the pod's own
CACHE = "/var/cache/anamorph"
# The volume is the node's; engines take no cache that others own.
REPLICAS = f"{CACHE}/replicas"
TLS = "/etc/anamorph/tls"
RAY_TLS, RAY_CA = "/etc/anamorph/ray-tls", "/etc/anamorph/ray-ca"
_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
_MIB = 2**20
# Logs, sessions and what Ray spills: whatever is no replica.
_TMP_SIZE = "10Gi"


def volumes(group: Group) -> list[Manifest]:
    """The volumes of a pod."""
    compute = group.compute
    found = [_empty("tmp", _TMP_SIZE), _empty("cache", _cache_size(group)), *pods.ca_volume(_ca(group))[0]]
    if compute.tls_secret is not None:
        found.append(_secret("tls", compute.tls_secret))
    if compute.ray_ca_secret is not None:
        found += [_secret("ray-ca", compute.ray_ca_secret), pods.memory_volume("ray-tls", "1Mi")]
    if group.scales:
        found.append(_account())
    return found


def mounts(group: Group) -> list[Manifest]:
    """Where Ray itself sees them. The account's token is not among them."""
    compute = group.compute
    found = [mount("tmp", TMP, writable=True), mount("cache", CACHE, writable=True)]
    found += pods.ca_volume(_ca(group))[1]
    if compute.tls_secret is not None:
        found.append(mount("tls", TLS))
    if compute.ray_ca_secret is not None:
        found.append(mount("ray-tls", RAY_TLS))
    return found


def autoscaler_mounts(group: Group) -> list[Manifest]:
    """Where the autoscaler sees them: it alone asks the API server, though it is in the head's pod."""
    certificates = [mount("ray-tls", RAY_TLS)] if group.compute.ray_ca_secret else []
    return [mount("tmp", TMP, writable=True), mount("account", _ACCOUNT), *certificates]


def tls_env(group: Group) -> dict[str, str]:
    """Variables by which Ray encrypts its own traffic; none where no authority is given."""
    if group.compute.ray_ca_secret is None:
        return {}
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": f"{RAY_TLS}/tls.crt",
        "RAY_TLS_SERVER_KEY": f"{RAY_TLS}/tls.key",
        "RAY_TLS_CA_CERT": f"{RAY_TLS}/ca.crt",
    }


def certificate(group: Group) -> list[Manifest]:
    """The container that makes a pod's certificate before Ray starts.

    Ray's peers know each other by addresses, which nobody knows before the pod has one. So a
    certificate that is made beforehand is good for no pod.
    """
    if group.compute.ray_ca_secret is None:
        return []
    address = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    little = {"cpu": "100m", "memory": "256Mi"}
    container = {
        "name": "certificate",
        "image": group.ray.image,
        "imagePullPolicy": group.compute.pull_policy,
        "command": ["python3", "-m", "anamorph.serve.cluster.certificate", RAY_CA, RAY_TLS],
        "env": [address],
        "resources": {"requests": dict(little), "limits": dict(little)},
        "securityContext": pods.container_security(),
        "volumeMounts": [mount("ray-ca", RAY_CA), mount("ray-tls", RAY_TLS, writable=True)],
    }
    return [container]


def mount(name: str, path: str, *, writable: bool = False) -> dict[str, Any]:
    """One entry of ``volumeMounts``."""
    return {"name": name, "mountPath": path, **({} if writable else {"readOnly": True})}


def _ca(group: Group) -> str | None:
    return group.compute.ca_config_map


def _cache_size(group: Group) -> str:
    # The cache evicts beyond its bound, which entries in use may exceed. Beyond this the pod is evicted.
    return f"{2 * -(-group.cache_bytes // _MIB)}Mi"


def _account() -> Manifest:
    """What a service account's folder usually holds."""
    namespace = {"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}
    authority = {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}
    sources = [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}},
        {"configMap": authority},
        {"downwardAPI": {"items": [namespace]}},
    ]
    return {"name": "account", "projected": {"sources": sources, "defaultMode": pods.READABLE}}


def _empty(name: str, size: str) -> Manifest:
    return {"name": name, "emptyDir": {"sizeLimit": size}}


def _secret(name: str, secret: str) -> Manifest:
    return {"name": name, "secret": {"secretName": secret, "defaultMode": pods.READABLE}}
