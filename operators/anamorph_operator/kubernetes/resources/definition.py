"""Typed models → CustomResourceDefinitions.

pydantic writes JSON Schema; Kubernetes takes a part of it, the structural schemas of OpenAPI v3: no
references, one type for each value, nothing but validations in alternatives. What has no
counterpart there is an error and never left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from anamorph_operator.kubernetes.resources.encrypted_model import EncryptedModelSpec, EncryptedModelStatus
from anamorph_operator.kubernetes.resources.part import GROUP, VERSION, rule
from anamorph_operator.kubernetes.resources.serving_cluster import ServingClusterSpec, ServingClusterStatus

_KEPT = {
    "type",
    "format",
    "pattern",
    "enum",
    "default",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "maxProperties",
    "required",
    "x-kubernetes-validations",
}
_DROPPED = {"title", "$defs", "description", "const", "minProperties"}
_LIST_KEYS = {"conditions": "type", "workerGroups": "name", "pools": "name", "versions": "version"}

Schema = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of ``kubectl get``."""

    name: str
    path: str
    kind: str = "string"
    priority: int = 0

    def manifest(self) -> Schema:
        """As the definition takes it."""
        return {"name": self.name, "type": self.kind, "jsonPath": self.path, "priority": self.priority}


@dataclass(frozen=True)
class Kind:
    """One custom resource: its names, its models, its columns."""

    name: str
    plural: str
    short: str
    spec: type[BaseModel]
    status: type[BaseModel]
    columns: tuple[Column, ...]
    rules: tuple[dict[str, str], ...] = ()


def _condition(kind: str) -> str:
    return f'.status.conditions[?(@.type=="{kind}")].status'


_REASON = '.status.conditions[?(@.type=="Ready")].reason'

ENCRYPTED_MODEL = Kind(
    "EncryptedModel",
    "encryptedmodels",
    "emodel",
    EncryptedModelSpec,
    EncryptedModelStatus,
    (
        Column("Tenant", ".spec.tenant"),
        Column("Ready", _condition("Ready")),
        Column("Reason", _REASON),
        Column("Version", ".status.activeVersion", "integer"),
        Column("Rotating", _condition("Rotating"), priority=1),
        Column("Cluster", ".spec.servingCluster", priority=1),
        Column("Endpoint", ".status.endpoint", priority=1),
        Column("Age", ".metadata.creationTimestamp", "date"),
    ),
)
SERVING_CLUSTER = Kind(
    "ServingCluster",
    "servingclusters",
    "scluster",
    ServingClusterSpec,
    ServingClusterStatus,
    (
        Column("Ready", _condition("Ready")),
        Column("Reason", _REASON),
        Column("Models", ".status.models", "integer"),
        Column("Applications", ".status.applications", "integer", 1),
        Column("Endpoint", ".status.publicUrl", priority=1),
        Column("Age", ".metadata.creationTimestamp", "date"),
    ),
    (
        rule(
            "!has(self.spec.ray) || self.metadata.name.matches('^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$')",
            "the name must have at most 47 characters and begin with a letter: KubeRay makes others of it",
        ),
    ),
)
KINDS = (ENCRYPTED_MODEL, SERVING_CLUSTER)


def definition(kind: Kind) -> Schema:
    """The CustomResourceDefinition of one kind."""
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": _whole(kind)},
        "subresources": {"status": {}},
        "additionalPrinterColumns": [column.manifest() for column in kind.columns],
    }
    names = {
        "kind": kind.name,
        "listKind": f"{kind.name}List",
        "plural": kind.plural,
        "singular": kind.name.lower(),
        "shortNames": [kind.short],
        "categories": ["anamorph"],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{kind.plural}.{GROUP}",
            # An uninstalled chart must not take the objects of every tenant along.
            "annotations": {"helm.sh/resource-policy": "keep"},
        },
        "spec": {
            "group": GROUP,
            "names": names,
            "scope": "Namespaced",
            "conversion": {"strategy": "None"},
            "versions": [version],
        },
    }


def _whole(kind: Kind) -> Schema:
    # A model's id is the object's name unless it says another; both are ids.
    name = {
        "rule": "self.metadata.name.matches('^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$')",
        "message": "the name must have at most 63 characters of a-z, 0-9 and - (it is an id)",
    }
    return {
        "type": "object",
        "description": _first_line(kind.spec),
        "required": ["spec"],
        "x-kubernetes-validations": [name, *kind.rules],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": structural(kind.spec),
            "status": structural(kind.status),
        },
    }


def structural(model: type[BaseModel]) -> Schema:
    """The structural schema of a model.

    Raises:
        TypeError: it says something that a structural schema cannot.
    """
    schema = model.model_json_schema(by_alias=True)
    return _Structural(schema.get("$defs", {})).of(schema, model.__name__)


class _Structural:
    """Rewrites one JSON Schema; ``at`` is the place, for errors."""

    def __init__(self, defs: Schema) -> None:
        self._defs = defs

    def of(self, schema: Schema, at: str) -> Schema:
        schema = self._resolved(schema, at)
        found = {key: value for key, value in schema.items() if key in _KEPT}
        if "description" in schema:
            found["description"] = schema["description"].partition("\n")[0]
        found |= self._bounds(schema) | self._children(schema, at)
        if "properties" in found and "default" in found:
            # Written out: the API server holds a default against the validations as it stands.
            parts = found["properties"]
            found["default"] = {name: parts[name]["default"] for name in parts if "default" in parts[name]}
        unknown = schema.keys() - _KEPT - _DROPPED - self._HANDLED
        if unknown or "type" not in found:
            raise TypeError(
                f"{at}: a structural schema has no {', '.join(sorted(unknown)) or 'value of any type'}"
            )
        return found

    _HANDLED = frozenset(
        {
            "properties",
            "items",
            "additionalProperties",
            "minimum",
            "maximum",
            "exclusiveMinimum",
            "propertyNames",
        }
    )

    def _resolved(self, schema: Schema, at: str) -> Schema:
        """References and ``X | None`` replaced by what they mean; a value that may be absent is left out."""
        if "$ref" in schema:
            target = self._defs[schema["$ref"].rpartition("/")[2]]
            return self._resolved(target, at) | {k: v for k, v in schema.items() if k != "$ref"}
        if "anyOf" in schema:
            others = [one for one in schema["anyOf"] if one.get("type") != "null"]
            if len(others) != 1:
                raise TypeError(f"{at}: a value has one type")
            rest = {k: v for k, v in schema.items() if k != "anyOf" and not (k == "default" and v is None)}
            return self._resolved(others[0], at) | rest
        return schema

    @staticmethod
    def _bounds(schema: Schema) -> Schema:
        found: Schema = {key: schema[key] for key in ("minimum", "maximum") if key in schema}
        if "exclusiveMinimum" in schema:  # a boolean beside the bound, in OpenAPI 3.0
            found |= {"minimum": schema["exclusiveMinimum"], "exclusiveMinimum": True}
        return found

    def _children(self, schema: Schema, at: str) -> Schema:
        found: Schema = {}
        if "properties" in schema:
            # Unknown fields are refused by ``fieldValidation=Strict`` and pruned otherwise: no
            # ``additionalProperties`` beside properties.
            found["properties"] = {
                name: self.of(part, f"{at}.{name}") | self._list_type(name)
                for name, part in schema["properties"].items()
            }
        elif isinstance(schema.get("additionalProperties"), dict):
            found["additionalProperties"] = self.of(schema["additionalProperties"], f"{at}.*")
        if "items" in schema:
            found["items"] = self.of(schema["items"], f"{at}[]")
        return found

    @staticmethod
    def _list_type(name: str) -> Schema:
        key = _LIST_KEYS.get(name)
        return {} if key is None else {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().partition("\n")[0]
