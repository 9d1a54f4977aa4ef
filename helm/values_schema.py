"""``values.schema.json`` of the chart, from its default values and from the models of what it configures.

    python helm/values_schema.py > helm/anamorph/values.schema.json

A value has the type of its default. What an empty list or map may hold is said in ``RULES``; settings that
are handed on to key service and ``ServingCluster`` have the schemas of the models that read them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from anamorph_keysvc.identity.bindings import Binding
from anamorph_keysvc.identity.settings import OidcSettings
from anamorph_keysvc.settings import Limits
from anamorph_keysvc.vault.settings import VaultSettings
from anamorph_keysvc.webhooks.settings import WebhookSettings
from anamorph_operator.kubernetes.resources.definition import structural
from anamorph_operator.kubernetes.resources.encrypted_model import EncryptedModelSpec
from anamorph_operator.kubernetes.resources.serving_cluster import ServingClusterSpec

Schema = dict[str, Any]
VALUES = Path(__file__).parent / "anamorph" / "values.yaml"


def closed(properties: dict[str, Schema], **more: Any) -> Schema:
    return {"type": "object", "additionalProperties": False, "properties": properties, **more}


def listed(items: Schema) -> Schema:
    return {"type": "array", "items": items}


TEXT: Schema = {"type": "string"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
# What Kubernetes itself defines and checks: a copy of its schemas would be older than the cluster.
FOREIGN: Schema = {"type": "object"}
AMOUNT = {"anyOf": [{"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]i?)?$"}, {"type": "number"}]}
AMOUNTS = {"type": "object", "additionalProperties": AMOUNT}
TOLERATION = closed(
    {
        "key": TEXT,
        "operator": {"enum": ["Exists", "Equal"]},
        "value": TEXT,
        "effect": {"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
        "tolerationSeconds": {"type": "integer"},
    }
)
PEER = closed({"ipBlock": FOREIGN, "namespaceSelector": FOREIGN, "podSelector": FOREIGN}, minProperties=1)
NAME = {"type": "string", "pattern": r"^([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)?$"}
OBJECT_NAME = {"type": "string", "pattern": r"^([a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?)?$"}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
MANIFEST = {"type": "object", "required": ["apiVersion", "kind", "metadata"]}


def parts(schema: Any, defs: Schema) -> Any:
    """A schema of pydantic's with its references written out, and without what only people read."""
    if isinstance(schema, list):
        return [parts(one, defs) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return parts(defs[schema["$ref"].rpartition("/")[2]], defs)
    dropped = {"$defs", "title", "description", "default", "discriminator", "format"}
    kept = {key: value for key, value in schema.items() if key == "properties" or key not in dropped}
    return {
        key: {name: parts(one, defs) for name, one in value.items()}
        if key == "properties"
        else parts(value, defs)
        for key, value in kept.items()
    }


def model(kind: type[BaseModel], *without: str) -> Schema:
    """The schema of a model, less the fields that the chart sets itself; none is required here."""
    schema: Schema = kind.model_json_schema()
    found: Schema = parts(schema, schema.get("$defs", {}))
    left = {name: one for name, one in found["properties"].items() if name not in without}
    required = [] if without else found.get("required", [])
    return closed(left, **({"required": required} if required else {}))


def strict(schema: Any) -> Any:
    """A structural schema of Kubernetes as JSON Schema: closed, without extensions."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {}
    for key, value in schema.items():
        if key == "properties":
            found[key] = {name: strict(one) for name, one in value.items()}
        elif key == "minimum" and schema.get("exclusiveMinimum") is True:
            found["exclusiveMinimum"] = value
        elif key not in {"description", "default", "exclusiveMinimum"} and not key.startswith("x-kubernetes"):
            found[key] = strict(value)
    if "properties" in found:
        found["additionalProperties"] = False
    return found


def serving_cluster() -> Schema:
    schema: Schema = strict(structural(ServingClusterSpec))
    # The chart fills the image in, and says itself what an empty URI lacks; null takes a default away.
    ray = schema["properties"]["ray"]
    ray["required"] = [name for name in ray["required"] if name != "image"]
    ray["type"] = ["object", "null"]
    uri = schema["properties"]["storage"]["properties"]["uri"]
    uri["pattern"] = f"^$|{uri['pattern']}"
    return schema


def tested_model() -> Schema:
    schema: Schema = strict(structural(EncryptedModelSpec))
    # The chart sets the others itself, and says what is missing where the test is on.
    own = {"tenant", "model", "servingCluster", "rotationPolicy"}
    return closed({name: one for name, one in schema["properties"].items() if name not in own})


RULES: dict[str, Schema] = {
    "fullnameOverride": {"type": "string", "pattern": "^([a-z]([-a-z0-9]{0,38}[a-z0-9])?)?$"},
    "images.pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "images.pullSecrets": listed(OBJECT_NAME),
    "*.digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
    "images.tag": {"type": "string", "not": {"const": "latest"}},
    "images.*.tag": {"type": "string", "not": {"const": "latest"}},
    "namespaces.*.name": {**NAME, "minLength": 1},
    "tls.source": {"enum": ["certManager", "existing", "generated"]},
    "keysvc.replicas": {"type": "integer", "minimum": 1},
    "operator.replicas": {"type": "integer", "minimum": 1},
    "keysvc.identity.bindings": listed(model(Binding)),
    "keysvc.identity.oidc": listed(model(OidcSettings)),
    "keysvc.limits": model(Limits),
    "keysvc.webhooks": model(WebhookSettings),
    "keysvc.vault.address": {"type": "string", "pattern": "^(https://[^/@?#]+)?$"},
    "keysvc.vault.extra": model(
        VaultSettings,
        *(
            "address",
            "ca_file",
            "namespace",
            "mount",
            "production",
            "issuer",
            "releaser",
            "shredder",
            "setup",
        ),
    ),
    "operator.allowBase": listed(TEXT),
    "operator.rayTokenSecrets": listed({**NAME, "minLength": 1}),
    "materializer.cpu": AMOUNT,
    "materializer.memory": AMOUNT,
    "materializer.scratch": AMOUNT,
    "materializer.accessMode": {"enum": ["ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"]},
    "servingCluster.spec": serving_cluster(),
    "tests.namespace": {**NAME, "minLength": 1},
    "tests.tenant": {**NAME, "minLength": 1},
    "tests.model": tested_model(),
    "tests.withinSeconds": {"type": "integer", "minimum": 60},
    "networkPolicies.apiServer.cidrs": listed({"type": "string", "pattern": "/[0-9]+$"}),
    "networkPolicies.extraEgress.*": listed(FOREIGN),
    "*.ports": listed(PORT),
    "*.port": PORT,
    "*.to": listed(PEER),
    "*.from": listed(PEER),
    "*.uploadersFrom": listed(PEER),
    "routes.gateway.parentRefs": listed(FOREIGN),
    "extraManifests": listed(MANIFEST),
    "*.resources": closed({"requests": AMOUNTS, "limits": AMOUNTS, "claims": listed(FOREIGN)}),
    "*.tolerations": listed(TOLERATION),
    "*.affinity": closed(dict.fromkeys(("nodeAffinity", "podAffinity", "podAntiAffinity"), FOREIGN)),
    "*.topologySpreadConstraints": listed(FOREIGN),
    "*.extraEnv": listed(closed({"name": TEXT, "value": TEXT, "valueFrom": FOREIGN}, required=["name"])),
    "*.extraVolumes": listed({"type": "object", "required": ["name"]}),
    "*.extraVolumeMounts": listed({"type": "object", "required": ["name", "mountPath"]}),
    **dict.fromkeys(("*.labels", "commonLabels", "*Annotations", "*.annotations", "*.nodeSelector"), TEXTS),
    "canary.baselines": TEXTS,
    "*Secret": OBJECT_NAME,
    "*ConfigMap": OBJECT_NAME,
}


def schema_of(value: Any, path: str) -> Schema:
    """The schema of a value, from the rule for its place, else from its default.

    Raises:
        TypeError: the default says nothing about what may be there, and no rule does.
    """
    for pattern, rule in RULES.items():
        if fnmatch(path, pattern):
            return rule
    if isinstance(value, bool):
        return {"type": "boolean"}
    if isinstance(value, int):
        return {"type": "integer", "minimum": 0}
    if isinstance(value, str):
        return TEXT
    if isinstance(value, dict) and value:
        return closed(dict(children(value, path)))
    raise TypeError(f"{path}: say in RULES what may be there")


def children(value: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    for name, one in value.items():
        yield name, schema_of(one, f"{path}.{name}" if path else name)


def values_schema() -> Schema:
    values = yaml.safe_load(VALUES.read_text())
    return {"$schema": "http://json-schema.org/draft-07/schema#", **closed(dict(children(values)))}


if __name__ == "__main__":
    json.dump(values_schema(), sys.stdout, indent=2)
    sys.stdout.write("\n")
