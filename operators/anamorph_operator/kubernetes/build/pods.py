"""What every pod of ours has: labels, restricted security, the store's credential."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anamorph_operator.kubernetes.resources.part import GROUP
from anamorph_operator.kubernetes.resources.serving_cluster import Storage

Manifest = dict[str, Any]

USER = 65532
"""The user of our images: not root, and none of any node's."""

CA_MOUNT = "/etc/anamorph/ca"
CA_FILE = f"{CA_MOUNT}/ca.crt"
# Who may read files of Secrets, tokens and ConfigMaps: the owner and the pod's group.
READABLE = 0o440

TENANT, MODEL, VERSION = f"{GROUP}/tenant", f"{GROUP}/model", f"{GROUP}/version"
CLUSTER = f"{GROUP}/serving-cluster"


def labels(component: str, **more: str) -> dict[str, str]:
    """Labels that NetworkPolicies and people go by.

    Args:
        component: ``materializer`` or ``ray``.
        more: further ones, by the constants of this module.
    """
    ours = {
        "app.kubernetes.io/part-of": "anamorph",
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/managed-by": "anamorph-operator",
    }
    return {**ours, **more}


def pod_security() -> Manifest:
    """``securityContext`` of a pod under the profile *restricted*; its volumes belong to its group."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> Manifest:
    """``securityContext`` of a container: no privilege, and nothing to write but its volumes."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def variables(values: Mapping[str, str]) -> list[Manifest]:
    """``env`` from plain values, in their order."""
    return [{"name": name, "value": value} for name, value in values.items()]


def from_secret(name: str, secret: str, key: str) -> Manifest:
    """A variable that the kubelet reads from a Secret: the operator never does."""
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def store_env(storage: Storage, ca_config_map: str | None) -> list[Manifest]:
    """Variables by which a pod reaches the store.

    The bundle counts for a store of one's own only: with it in force, public stores would not be
    believed.
    """
    env: list[Manifest] = []
    if storage.endpoint_url is not None:
        env += variables({"AWS_ENDPOINT_URL_S3": storage.endpoint_url})
        if ca_config_map is not None:
            env += variables({"AWS_CA_BUNDLE": CA_FILE})
    if storage.credentials_secret is not None:
        keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        env += [from_secret(key, storage.credentials_secret, key) for key in keys]
    return env


def ca_volume(config_map: str | None) -> tuple[list[Manifest], list[Manifest]]:
    """Volume and mount of the certificate that signs those of our parts, in ``ca.crt``; none if absent."""
    if config_map is None:
        return [], []
    volume = {"name": "ca", "configMap": {"name": config_map, "defaultMode": READABLE}}
    return [volume], [{"name": "ca", "mountPath": CA_MOUNT, "readOnly": True}]


def memory_volume(name: str, size: str) -> Manifest:
    """A folder in memory, which counts against its pod's limit and never touches a disk."""
    return {"name": name, "emptyDir": {"medium": "Memory", "sizeLimit": size}}


def owned(manifest: Manifest, *owners: Manifest) -> Manifest:
    """The same object, which goes when the last of its owners has gone.

    Args:
        manifest: of the object.
        owners: as the API server holds them, with their ``uid``, in the same namespace.
    """
    references = [
        {
            "apiVersion": owner["apiVersion"],
            "kind": owner["kind"],
            "name": owner["metadata"]["name"],
            "uid": owner["metadata"]["uid"],
        }
        for owner in owners
    ]
    return {**manifest, "metadata": {**manifest["metadata"], "ownerReferences": references}}


def present(manifest: Mapping[str, Any]) -> Manifest:
    """A manifest without what is absent or empty: the API server drops it anyway, and would then differ."""
    return {key: value for key, value in manifest.items() if value is not None and value not in ({}, [], ())}
