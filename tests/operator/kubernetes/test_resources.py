"""What the API server takes of our resources: good ones with their defaults, and no bad one."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from kubernetes import client
from kubernetes.client import ApiException
from pydantic import BaseModel, ValidationError
from tests.operator.kubernetes.conftest import Kubernetes
from tests.operator.kubernetes.objects import ABSENT, change, encrypted_model, serving_cluster

from anamorph.wire.admin import Autoscaling, RotationPolicy, Serving
from anamorph_operator.kubernetes.resources.admission import TENANTS
from anamorph_operator.kubernetes.resources.definition import (
    ENCRYPTED_MODEL,
    KINDS,
    SERVING_CLUSTER,
    Kind,
    definition,
    structural,
)
from anamorph_operator.kubernetes.resources.encrypted_model import (
    AutoscalingSpec,
    EncryptedModelSpec,
    RotationPolicySpec,
    ServingSpec,
)
from anamorph_operator.kubernetes.resources.part import GROUP, VERSION, Part
from anamorph_operator.kubernetes.resources.serving_cluster import ServingClusterSpec

pytestmark = [pytest.mark.real]

MAKE = {"EncryptedModel": encrypted_model, "ServingCluster": serving_cluster}
SPECS: dict[str, type[Part]] = {"EncryptedModel": EncryptedModelSpec, "ServingCluster": ServingClusterSpec}
SHARED = {"serving.placement": "shared", "serving.pool": "small"}
DIGEST = "sha256:" + "0" * 64

GOOD_MODELS: list[dict[str, Any]] = [
    {},
    {"base.uri": "hf://org/name@main", "base.digest": DIGEST, "model": "chat-v2", "profile": "permute"},
    {"rotationPolicy.periodSeconds": 86400, "rotationPolicy.tokenBudget": 10**9},
    {"serving.tensorParallel": 2, "serving.numGpus": 1, "serving.engine": "vllm"},
    {"serving.autoscaling.minReplicas": 0, "serving.autoscaling.maxReplicas": 4},
    {**SHARED, "serving.weight": 2, "serving.tokensPerSecond": 500},
]
GOOD_CLUSTERS: list[dict[str, Any]] = [
    {},
    {"ray": ABSENT, "existing": {"dashboardUrl": "http://ray:8265", "serveUrl": "http://ray:8000"}},
    {
        "ray.workerGroups": [
            {"name": "gpu", "replicas": 2, "maxReplicas": 4, "accelerator": "H100", "resources": {"gpus": 8}}
        ],
        "ray.autoscaling": True,
        "ray.redis": {"address": "redis.anamorph.svc:6379"},
    },
    {"pools": [{"name": "small", "slots": 4}], "publicUrl": "https://models.example.com"},
]
BAD_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "no tenant": ({"tenant": ABSENT}, "spec.tenant"),
    "a tenant that is no id": ({"tenant": "Acme"}, "spec.tenant"),
    "a tenant with a slash": ({"tenant": "a/b"}, "spec.tenant"),
    "a tenant that is too long": ({"tenant": "a" * 64}, "spec.tenant"),
    "a model that is no id": ({"model": "chat.v1"}, "spec.model"),
    "no base": ({"base": ABSENT}, "spec.base"),
    "a base by file URL": ({"base.uri": "file:///models"}, "spec.base.uri"),
    "a base of an unknown scheme": ({"base.uri": "ftp://host/x"}, "spec.base.uri"),
    "a digest of another kind": ({"base.digest": "md5:0"}, "spec.base.digest"),
    "an unknown profile": ({"profile": "xor"}, "spec.profile"),
    "an unknown dtype": ({"dtype": "int8"}, "spec.dtype"),
    "a vocabulary of one": ({"vocabSize": 1}, "spec.vocabSize"),
    "a context of none": ({"contextLength": 0}, "spec.contextLength"),
    "a context as text": ({"contextLength": "2048"}, "spec.contextLength"),
    "an unknown engine": ({"serving.engine": "sglang"}, "spec.serving.engine"),
    "an unknown placement": ({"serving.placement": "spread"}, "spec.serving.placement"),
    "shared without a pool": ({"serving.placement": "shared"}, "needs a pool"),
    "a pool without shared": ({"serving.pool": "small"}, "needs a pool"),
    "ranks in a pool": ({**SHARED, "serving.tensorParallel": 2}, "a pool has one process"),
    "stages in a pool": ({**SHARED, "serving.pipelineParallel": 2}, "a pool has one process"),
    "a pool that sleeps": ({**SHARED, "serving.autoscaling.minReplicas": 0}, "always on"),
    "a weight without a pool": ({"serving.weight": 2}, "weight and tokensPerSecond"),
    "a rate without a pool": ({"serving.tokensPerSecond": 10}, "weight and tokensPerSecond"),
    "no ranks": ({"serving.tensorParallel": 0}, "spec.serving.tensorParallel"),
    "negative GPUs": ({"serving.numGpus": -1}, "spec.serving.numGpus"),
    "more replicas at least than at most": (
        {"serving.autoscaling.minReplicas": 3, "serving.autoscaling.maxReplicas": 2},
        "maxReplicas must be at least",
    ),
    "no replica at most": ({"serving.autoscaling.maxReplicas": 0}, "maxReplicas"),
    "a period of a second": ({"rotationPolicy.periodSeconds": 1}, "periodSeconds"),
    "a budget of nothing": ({"rotationPolicy.tokenBudget": 0}, "tokenBudget"),
    "a grace that clients outlive": ({"rotationPolicy.graceSeconds": 100}, "graceSeconds must be at least"),
    "a cache of an hour": ({"rotationPolicy.clientCacheTtlSeconds": 3600}, "clientCacheTtlSeconds"),
    "all jitter": ({"rotationPolicy.jitter": 1}, "jitter"),
    "no cluster": ({"servingCluster": ABSENT}, "spec.servingCluster"),
    "a cluster in another namespace": ({"servingCluster": "other/main"}, "spec.servingCluster"),
    "a deadline before it": ({"deletion.deadlineSeconds": -1}, "deadlineSeconds"),
    "an unknown field": ({"key": "secret"}, "unknown field"),
    "an unknown field inside": ({"serving.gpu": 1}, "unknown field"),
}
BAD_CLUSTERS: dict[str, tuple[dict[str, Any], str]] = {
    "neither kind": ({"ray": ABSENT}, "exactly one of ray and existing"),
    "both kinds": (
        {"existing": {"dashboardUrl": "http://ray:8265", "serveUrl": "http://ray:8000"}},
        "exactly one of ray and existing",
    ),
    "no storage": ({"storage": ABSENT}, "spec.storage"),
    "storage by http": ({"storage.uri": "https://store/x"}, "spec.storage.uri"),
    "an image without a version": ({"ray.image": "registry.example/compute"}, "spec.ray.image"),
    "an image that moves": ({"ray.image": "registry.example/compute:latest"}, "not latest"),
    "no token": ({"ray.tokenSecret": ABSENT}, "spec.ray.tokenSecret"),
    "501 applications": ({"maxApplications": 501}, "maxApplications"),
    "autoscaling without bounds": (
        {"ray.autoscaling": True, "ray.workerGroups": [{"name": "gpu"}]},
        "autoscaling needs maxReplicas",
    ),
    "fewer at most than at least": (
        {"ray.workerGroups": [{"name": "gpu", "replicas": 3, "maxReplicas": 2}]},
        "maxReplicas must be at least replicas",
    ),
    "a group by the head's name": (
        {"ray.workerGroups": [{"name": "headgroup"}]},
        "headgroup is the head's own",
    ),
    "a version of Ray in words": ({"ray.rayVersion": "newest"}, "rayVersion"),
    "one name twice": ({"ray.workerGroups": [{"name": "a"}, {"name": "a"}]}, "Duplicate value"),
    "a URL with a password": (
        {"ray": ABSENT, "existing": {"dashboardUrl": "http://u:p@ray", "serveUrl": "http://ray"}},
        "dashboardUrl",
    ),
    "memory in words": ({"ray.head.resources.memory": "lots"}, "memory"),
    "an unknown field": ({"token": "x"}, "unknown field"),
}
CHANGES: dict[str, tuple[Kind, dict[str, Any], dict[str, Any], str]] = {
    "tenant": (ENCRYPTED_MODEL, {}, {"tenant": "globex"}, "tenant never changes"),
    "profile": (ENCRYPTED_MODEL, {}, {"profile": "permute"}, "profile never changes"),
    "vocabulary": (ENCRYPTED_MODEL, {}, {"vocabSize": 5}, "vocabSize never changes"),
    "model": (ENCRYPTED_MODEL, {"model": "a"}, {"model": "b"}, "model never changes"),
    "model, named later": (ENCRYPTED_MODEL, {}, {"model": "b"}, "model never changes"),
    "tokenizer": (
        ENCRYPTED_MODEL,
        {"tokenizerDigest": DIGEST},
        {"tokenizerDigest": ABSENT},
        "tokenizerDigest",
    ),
    "template": (ENCRYPTED_MODEL, {}, {"chatTemplateDigest": DIGEST}, "chatTemplateDigest"),
    "image": (SERVING_CLUSTER, {}, {"ray.image": "registry.example/compute:2"}, "image never changes"),
    "head": (SERVING_CLUSTER, {}, {"ray.head.resources.memory": "9Gi"}, "make another ServingCluster"),
    "what Ray stands on": (
        SERVING_CLUSTER,
        {},
        {"ray.redis": {"address": "redis:6379"}},
        "make another ServingCluster",
    ),
    "a group's pods": (
        SERVING_CLUSTER,
        {"ray.workerGroups": [{"name": "a"}, {"name": "gpu", "logicalCpus": 3}]},
        {"ray.workerGroups": [{"name": "gpu", "logicalCpus": 4}, {"name": "a"}]},
        "logicalCpus",
    ),
    "storage": (SERVING_CLUSTER, {}, {"storage.uri": "s3://other"}, "storage.uri never changes"),
    "kind": (
        SERVING_CLUSTER,
        {},
        {"ray": ABSENT, "existing": {"dashboardUrl": "http://r:1", "serveUrl": "http://r:2"}},
        "does not change its kind",
    ),
}
ALLOWED: dict[str, tuple[Kind, dict[str, Any]]] = {
    "base": (ENCRYPTED_MODEL, {"base.uri": "s3://bases/smollm3", "contextLength": 4096}),
    "serving": (ENCRYPTED_MODEL, {"serving.autoscaling.maxReplicas": 3, "serving.numGpus": 0.5}),
    "policy": (ENCRYPTED_MODEL, {"rotationPolicy.periodSeconds": 3600}),
    "cluster": (ENCRYPTED_MODEL, {"servingCluster": "next"}),
    "workers": (SERVING_CLUSTER, {"ray.workerGroups": [{"name": "more", "replicas": 2}]}),
    "public URL": (SERVING_CLUSTER, {"publicUrl": "https://models.example.com"}),
}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [(ENCRYPTED_MODEL, one) for one in GOOD_MODELS] + [(SERVING_CLUSTER, one) for one in GOOD_CLUSTERS],
)
def test_a_good_object_gets_the_defaults_of_the_typed_model(
    kubernetes: Kubernetes, kind: Kind, changes: dict[str, Any]
) -> None:
    """The API server fills in exactly what the typed model would, so both mean the same by an object."""
    made = kubernetes.create(kind, kubernetes.namespace(), MAKE[kind.name](**changes))
    read = SPECS[kind.name].model_validate(made["spec"])
    assert read == SPECS[kind.name].model_validate(MAKE[kind.name](**changes)["spec"])
    assert made["spec"] == json.loads(json.dumps(read.manifest()))


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_bad_model_is_refused_by_name(kubernetes: Kubernetes, case: str) -> None:
    changes, why = BAD_MODELS[case]
    refused(kubernetes, ENCRYPTED_MODEL, changes, why)


@pytest.mark.parametrize("case", BAD_CLUSTERS)
def test_a_bad_cluster_is_refused_by_name(kubernetes: Kubernetes, case: str) -> None:
    changes, why = BAD_CLUSTERS[case]
    refused(kubernetes, SERVING_CLUSTER, changes, why)


def refused(kubernetes: Kubernetes, kind: Kind, changes: dict[str, Any], why: str) -> None:
    """The API server refuses it, and says what is wrong."""
    with pytest.raises(ApiException) as caught:
        kubernetes.create(kind, kubernetes.namespace(), MAKE[kind.name](**changes))
    assert caught.value.status in {400, 422}, caught.value.body
    assert why in json.loads(caught.value.body)["message"]


@pytest.mark.parametrize("name", ["a" * 64, "with.dot"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_name_that_is_no_id_is_refused(kubernetes: Kubernetes, kind: Kind, name: str) -> None:
    """Kubernetes takes longer names, and dots; ids do not."""
    with pytest.raises(ApiException, match="it is an id"):
        kubernetes.create(kind, kubernetes.namespace(), MAKE[kind.name](name))


@pytest.mark.parametrize("name", ["1main", "a" * 48])
def test_a_cluster_has_a_name_that_kuberay_takes(kubernetes: Kubernetes, name: str) -> None:
    """Of one that is there already, any id is a name."""
    with pytest.raises(ApiException, match="KubeRay makes others of it"):
        kubernetes.create(SERVING_CLUSTER, kubernetes.namespace(), serving_cluster(name))
    urls = {"dashboardUrl": "http://ray:8265", "serveUrl": "http://ray:8000"}
    existing = serving_cluster(name, ray=ABSENT, existing=urls)
    assert kubernetes.create(SERVING_CLUSTER, kubernetes.namespace(), existing)["metadata"]["name"] == name


@pytest.mark.parametrize("case", CHANGES)
def test_what_never_changes_cannot_be_changed(kubernetes: Kubernetes, case: str) -> None:
    kind, first, then, why = CHANGES[case]
    namespace = kubernetes.namespace("acme,globex")
    made = kubernetes.create(kind, namespace, MAKE[kind.name](**first))
    for path, value in then.items():
        change(made["spec"], path, value)
    with pytest.raises(ApiException) as caught:
        kubernetes.replace(kind, namespace, made)
    assert caught.value.status == 422
    assert why in json.loads(caught.value.body)["message"]


@pytest.mark.parametrize("case", ALLOWED)
def test_what_may_change_can_be_changed(kubernetes: Kubernetes, case: str) -> None:
    kind, then = ALLOWED[case]
    namespace = kubernetes.namespace()
    made = kubernetes.create(kind, namespace, MAKE[kind.name]())
    for path, value in then.items():
        change(made["spec"], path, value)
    assert kubernetes.replace(kind, namespace, made)["metadata"]["generation"] == 2


@pytest.mark.parametrize(
    ("tenants", "admitted"),
    [
        ("acme", True),
        ("globex, acme", True),
        ("globex", False),
        ("acme2", False),
        ("", False),
        (None, False),
    ],
)
def test_a_namespace_names_its_own_tenants_only(
    kubernetes: Kubernetes, tenants: str | None, admitted: bool
) -> None:
    """The annotation of the namespace decides, whoever creates the object."""
    namespace = kubernetes.namespace(tenants)
    if admitted:
        kubernetes.create(ENCRYPTED_MODEL, namespace, encrypted_model())
        return
    with pytest.raises(ApiException, match="is not bound to tenant acme") as caught:
        kubernetes.create(ENCRYPTED_MODEL, namespace, encrypted_model())
    assert caught.value.status == 403


def test_an_unbound_namespace_can_change_nothing(kubernetes: Kubernetes) -> None:
    """Once the annotation is taken away, the object can still be deleted, and no longer changed."""
    namespace = kubernetes.namespace()
    made = kubernetes.create(ENCRYPTED_MODEL, namespace, encrypted_model())
    client.CoreV1Api(kubernetes.server.admin).patch_namespace(
        namespace, {"metadata": {"annotations": {TENANTS: "globex"}}}
    )

    def change_again_and_again() -> None:
        """The policy sees namespaces as they were a moment ago."""
        found = made
        for context in range(4096, 4196):
            found["spec"]["contextLength"] = context
            found = kubernetes.replace(ENCRYPTED_MODEL, namespace, found)
            time.sleep(0.1)

    with pytest.raises(ApiException, match="is not bound to tenant acme"):
        change_again_and_again()
    kubernetes.objects.delete_namespaced_custom_object(
        GROUP, VERSION, namespace, ENCRYPTED_MODEL.plural, "chat"
    )


def test_the_typed_models_mean_what_the_key_service_means() -> None:
    """Defaults and bounds are those of the messages that the operator will send."""
    pairs: list[tuple[type[Part], type[BaseModel], dict[str, str]]] = [
        (RotationPolicySpec, RotationPolicy, {"_seconds": "_s"}),
        (AutoscalingSpec, Autoscaling, {"_seconds": "_s"}),
        (ServingSpec, Serving, {"_second": "_s"}),
    ]
    for ours, theirs, endings in pairs:
        for name, theirs_field in theirs.model_fields.items():
            ours_name = _renamed(name, ours, endings)
            default = ours.model_fields[ours_name].get_default()
            expected = theirs_field.get_default()
            if isinstance(default, Part):
                continue
            assert default == expected, (ours.__name__, name)
        assert len(ours.model_fields) == len(theirs.model_fields) + (ours is ServingSpec)  # its engine


def _renamed(name: str, ours: type[Part], endings: dict[str, str]) -> str:
    for long, short in endings.items():
        if name.endswith(short) and name.removesuffix(short) + long in ours.model_fields:
            return name.removesuffix(short) + long
    assert name in ours.model_fields, name
    return name


def test_what_a_structural_schema_cannot_say_is_an_error() -> None:
    """Nothing is left out silently on the way to Kubernetes."""

    class Odd(BaseModel):
        value: int | str

    class Free(BaseModel):
        value: Any

    for model in (Odd, Free):
        with pytest.raises(TypeError, match="value"):
            structural(model)


def test_a_spec_that_the_api_server_refuses_is_refused_by_the_typed_model() -> None:
    """For what both can say: types, bounds, patterns."""
    said_by_cel = {"serving", "rotationPolicy"}
    for changes, why in BAD_MODELS.values():
        if not why.startswith("spec.") or said_by_cel & {path.partition(".")[0] for path in changes}:
            continue
        with pytest.raises(ValidationError):
            EncryptedModelSpec.model_validate_json(
                json.dumps(encrypted_model(**changes)["spec"]), strict=True
            )


def test_definitions_are_kept_when_a_chart_goes() -> None:
    for kind in KINDS:
        assert definition(kind)["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
