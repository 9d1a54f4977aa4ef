"""Which objects of Kubernetes the operator deals with, and where the API server keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anamorph_operator.kubernetes.resources.definition import ENCRYPTED_MODEL, KINDS, SERVING_CLUSTER
from anamorph_operator.kubernetes.resources.part import GROUP, VERSION

Object = dict[str, Any]
"""An object as JSON: ``apiVersion``, ``kind``, ``metadata``, …"""


@dataclass(frozen=True)
class Resource:
    """One collection of namespaced objects; ``group`` is empty for Kubernetes' core."""

    group: str
    version: str
    plural: str

    def path(self, namespace: str | None, name: str | None = None, part: str | None = None) -> str:
        """The path of a collection, of one object in it, or of a part of that (``status``)."""
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        within = f"/namespaces/{namespace}" if namespace is not None else ""
        return "/".join([root + within, self.plural, *[step for step in (name, part) if step is not None]])

    def __str__(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural


JOBS = Resource("batch", "v1", "jobs")
PODS = Resource("", "v1", "pods")
CONFIG_MAPS = Resource("", "v1", "configmaps")
SERVICE_ACCOUNTS = Resource("", "v1", "serviceaccounts")
VOLUME_CLAIMS = Resource("", "v1", "persistentvolumeclaims")
NAMESPACES = Resource("", "v1", "namespaces")
LEASES = Resource("coordination.k8s.io", "v1", "leases")
RAY_SERVICES = Resource("ray.io", "v1", "rayservices")
ENCRYPTED_MODELS = Resource(GROUP, VERSION, ENCRYPTED_MODEL.plural)
SERVING_CLUSTERS = Resource(GROUP, VERSION, SERVING_CLUSTER.plural)

_BY_KIND = {
    ("v1", "ConfigMap"): CONFIG_MAPS,
    ("v1", "ServiceAccount"): SERVICE_ACCOUNTS,
    ("v1", "PersistentVolumeClaim"): VOLUME_CLAIMS,
    ("batch/v1", "Job"): JOBS,
    ("coordination.k8s.io/v1", "Lease"): LEASES,
    ("ray.io/v1", "RayService"): RAY_SERVICES,
} | {(f"{GROUP}/{VERSION}", kind.name): Resource(GROUP, VERSION, kind.plural) for kind in KINDS}


def resource_of(body: Object) -> Resource:
    """Where an object belongs.

    Raises:
        KeyError: it is of a kind that the operator has no business with.
    """
    return _BY_KIND[body["apiVersion"], body["kind"]]
