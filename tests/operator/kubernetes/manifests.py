"""Settings of the operator with everything in them, and what is built of them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from tests.operator.kubernetes.objects import serving_cluster

from anamorph.wire.admin import ModelRead
from anamorph_operator.kubernetes.build.materialization import Making, Materializer
from anamorph_operator.kubernetes.build.ray_group import Compute
from anamorph_operator.kubernetes.resources.serving_cluster import ServingClusterSpec, Storage, Toleration
from anamorph_operator.state import Ref

REF = Ref("acme", "chat", 3)
MODEL = ModelRead(
    id="chat",
    tenant="acme",
    base="s3://bases/smollm2",
    vocab_size=100,
    context_length=64,
    created_at=datetime(2026, 1, 1, tzinfo=UTC),
)
MAKING = Making(REF, MODEL)
STORAGE = Storage(
    uri="s3://replicas/all", endpoint_url="https://store.anamorph.svc:8333", credentials_secret="store"
)
PLAIN = Materializer(
    namespace="anamorph-jobs",
    image="registry.example/anamorph-materializer:0.1",
    keysvc="https://anamorph-keysvc.anamorph.svc:8400",
    audience="anamorph-keysvc",
    storage=Storage(uri="s3://replicas/all"),
    allow_base=("s3://bases/",),
)
FULL = replace(
    PLAIN,
    storage=STORAGE,
    bases_claim="bases",
    ca_config_map="anamorph-ca",
    priority_class="system-cluster-critical",
    node_selector={"disk": "fast"},
    tolerations=(Toleration(key="gpu", operator="Exists"),),
    pull_secrets=("registry",),
)
COMPUTE = Compute("anamorph-compute")
SECURED = Compute(
    "anamorph-compute",
    tls_secret="anamorph-serve-tls",
    ray_ca_secret="anamorph-ray-ca",
    ca_config_map="anamorph-ca",
    pull_secrets=("registry",),
)
GPU = {
    "name": "gpu",
    "replicas": 2,
    "maxReplicas": 4,
    "accelerator": "H100",
    "replicaMemory": "78Gi",
    "resources": {"cpu": "7500m", "memory": "64Gi", "gpus": 1},
    "nodeSelector": {"pool": "gpu"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "priorityClassName": "serving",
}
ALL: dict[str, Any] = {
    "ray.workerGroups": [GPU, {"name": "cpu", "resources": {"cpu": "2", "memory": "4Gi"}}],
    "ray.redis": {"address": "redis.anamorph.svc:6379", "passwordSecret": "redis"},
    "storage": STORAGE.manifest(),
}
SCALING = {
    **ALL,
    "ray.autoscaling": True,
    "ray.workerGroups": [GPU],
}


def cluster(**changes: Any) -> ServingClusterSpec:
    """The spec of a serving cluster."""
    return ServingClusterSpec.model_validate(serving_cluster(**changes)["spec"])
