"""Objects as the API server holds them → typed values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from pydantic import ValidationError

from anamorph.errors import SetupError
from anamorph_operator.kubernetes.resources.encrypted_model import EncryptedModelSpec, EncryptedModelStatus
from anamorph_operator.kubernetes.resources.part import GROUP, Part
from anamorph_operator.kubernetes.resources.serving_cluster import ServingClusterSpec, ServingClusterStatus

ROTATE = f"{GROUP}/rotate"
"""Annotation that asks for a rotation, one for each text."""
FORCE_DELETE = f"{GROUP}/force-delete"
LONGEST_REQUEST = 256

AnyPart = TypeVar("AnyPart", bound=Part)
AnyStatus = TypeVar("AnyStatus", bound=Part)


@dataclass(frozen=True)
class Metadata:
    """What Kubernetes itself keeps of an object."""

    namespace: str
    name: str
    uid: str
    generation: int
    created_at: datetime
    annotations: Mapping[str, str]
    deleting: bool

    @classmethod
    def read(cls, metadata: Mapping[str, Any]) -> Metadata:
        """From ``metadata``."""
        return cls(
            namespace=metadata["namespace"],
            name=metadata["name"],
            uid=metadata["uid"],
            generation=metadata.get("generation", 1),
            created_at=datetime.fromisoformat(metadata["creationTimestamp"]),
            annotations=dict(metadata.get("annotations") or {}),
            deleting=metadata.get("deletionTimestamp") is not None,
        )


@dataclass(frozen=True)
class EncryptedModel:
    """One model that is wanted."""

    metadata: Metadata
    spec: EncryptedModelSpec
    status: EncryptedModelStatus

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> EncryptedModel:
        """From an object.

        Raises:
            SetupError: a later release has defined what it says.
        """
        return cls(*_parts(EncryptedModelSpec, EncryptedModelStatus, body))

    @property
    def tenant(self) -> str:
        return self.spec.tenant

    @property
    def model(self) -> str:
        """Its id in the key service."""
        return self.spec.model or self.metadata.name

    @property
    def key(self) -> tuple[str, str]:
        """Tenant and model."""
        return self.tenant, self.model

    @property
    def request(self) -> str | None:
        """The text of the annotation that asks for a rotation, as the status keeps it."""
        text = self.metadata.annotations.get(ROTATE)
        return text[:LONGEST_REQUEST] if text else None


@dataclass(frozen=True)
class ServingCluster:
    """One Ray cluster that is wanted, or there already."""

    metadata: Metadata
    spec: ServingClusterSpec
    status: ServingClusterStatus

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> ServingCluster:
        """From an object.

        Raises:
            SetupError: a later release has defined what it says.
        """
        return cls(*_parts(ServingClusterSpec, ServingClusterStatus, body))

    @property
    def name(self) -> str:
        return self.metadata.name


def _parts(
    spec: type[AnyPart], status: type[AnyStatus], body: Mapping[str, Any]
) -> tuple[Metadata, AnyPart, AnyStatus]:
    return Metadata.read(body["metadata"]), _spec(spec, body), _status(status, body)


def _spec(kind: type[AnyPart], body: Mapping[str, Any]) -> AnyPart:
    try:
        return kind.model_validate(body["spec"])
    except ValidationError as error:
        fields = ", ".join(sorted({".".join(map(str, one["loc"])) for one in error.errors()}))
        name = f"{body['metadata']['namespace']}/{body['metadata']['name']}"
        raise SetupError(
            f"{body.get('kind', 'object')} {name} says what this operator does not know ({fields}):"
            " the custom resource definitions and the operator must be of one release"
        ) from None


def _status(kind: type[AnyPart], body: Mapping[str, Any]) -> AnyPart:
    """The status; an empty one for what another release wrote: it is computed anew anyway."""
    try:
        return kind.model_validate(body.get("status") or {})
    except ValidationError:
        return kind()
