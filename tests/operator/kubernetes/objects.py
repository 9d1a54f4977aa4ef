"""Smallest valid objects of our kinds, changed by paths such as ``serving.pool``."""

from __future__ import annotations

from typing import Any

ABSENT = object()


def encrypted_model(name: str = "chat", /, **changes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "tenant": "acme",
        "base": {"uri": "s3://bases/smollm2"},
        "vocabSize": 49152,
        "contextLength": 2048,
        "servingCluster": "main",
    }
    return _object("EncryptedModel", name, spec, changes)


def serving_cluster(name: str = "main", /, **changes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "ray": {"image": "registry.example/anamorph-compute:0.1", "tokenSecret": "ray-token"},
        "storage": {"uri": "s3://replicas/all"},
    }
    return _object("ServingCluster", name, spec, changes)


def _object(kind: str, name: str, spec: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for path, value in changes.items():
        change(spec, path, value)
    return {
        "apiVersion": "anamorph.dev/v1alpha1",
        "kind": kind,
        "metadata": {"name": name},
        "spec": spec,
    }


def change(spec: dict[str, Any], path: str, value: Any) -> None:
    """Set, or with ``ABSENT`` remove, what lies at a path with dots."""
    *parents, last = path.split(".")
    for parent in parents:
        spec = spec.setdefault(parent, {})
    if value is ABSENT:
        spec.pop(last, None)
    else:
        spec[last] = value


def held(body: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    """An object as the API server holds it; ``metadata`` in the API's own spelling."""
    kept = {
        "namespace": "team",
        "uid": "0b5c0c1e-1111-4222-8333-444455556666",
        "generation": 1,
        "creationTimestamp": "2026-01-01T00:00:00Z",
    }
    return {**body, "metadata": {**kept, **body["metadata"], **metadata}}
