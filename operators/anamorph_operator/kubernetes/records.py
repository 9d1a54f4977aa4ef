"""What a resource says, in the words of the key service."""

from __future__ import annotations

from typing import Any

from anamorph.wire.admin import Autoscaling, KeyVersionRead, ModelRead, RotationPolicy, Serving
from anamorph_operator.kubernetes.resources.encrypted_model import (
    AutoscalingSpec,
    RotationPolicySpec,
    ServingSpec,
)
from anamorph_operator.kubernetes.resources.objects import EncryptedModel

SETTINGS = ("base", "base_digest", "engine", "dtype", "context_length", "serving")
"""Fields of a model's record that may change; a version keeps what it was issued under."""
FIXED = ("profile", "vocab_size", "tokenizer_digest", "chat_template_digest")
"""Fields that never do: clients hold keys and tokenizers for them."""


def policy(spec: RotationPolicySpec) -> RotationPolicy:
    """The rotation policy."""
    return RotationPolicy.model_validate(_renamed(spec.model_dump()))


def serving(spec: ServingSpec) -> Serving:
    """How the model is served, without its engine."""
    fields = _renamed(spec.model_dump(exclude={"engine", "autoscaling"}))
    return Serving.model_validate({**fields, "autoscaling": _autoscaling(spec.autoscaling)})


def _autoscaling(spec: AutoscalingSpec) -> Autoscaling:
    return Autoscaling.model_validate(_renamed(spec.model_dump()))


def _renamed(fields: dict[str, Any]) -> dict[str, Any]:
    """Durations and rates as the key service spells them: ``grace_s``, ``tokens_per_s``."""
    return {name.replace("_seconds", "_s").replace("_second", "_s"): v for name, v in fields.items()}


def settings(resource: EncryptedModel) -> dict[str, Any]:
    """The fields ``SETTINGS``, as the resource wants them."""
    spec = resource.spec
    return {
        "base": spec.base.uri,
        "base_digest": spec.base.digest,
        "engine": spec.serving.engine,
        "dtype": spec.dtype,
        "context_length": spec.context_length,
        "serving": serving(spec.serving),
    }


def settings_of(record: ModelRead) -> dict[str, Any]:
    """The fields ``SETTINGS``, as a record has them."""
    return _fields(record)


def issued_under(version: KeyVersionRead) -> dict[str, Any] | None:
    """The fields ``SETTINGS`` that a version was issued under; ``None`` where that is not known."""
    issued = getattr(version, "settings", None)
    return None if issued is None else _fields(issued)


def _fields(of: object) -> dict[str, Any]:
    return {name: getattr(of, name, None) for name in SETTINGS}


def creation(resource: EncryptedModel) -> dict[str, Any]:
    """The fields of ``ModelCreate``; what is absent is left out."""
    spec = resource.spec
    fixed = {name: getattr(spec, name) for name in FIXED}
    fields = {
        "id": resource.model,
        **fixed,
        **settings(resource),
        "policy": policy(spec.rotation_policy),
    }
    return {name: value for name, value in fields.items() if value is not None}


def mismatch(resource: EncryptedModel, record: ModelRead) -> str | None:
    """Why a record cannot be what the resource wants, in words; ``None`` if it can.

    A model may have been registered before, by the admin API.
    """
    wrong = [name for name in FIXED if getattr(record, name) != getattr(resource.spec, name)]
    if not wrong:
        return None
    return (
        f"model '{resource.model}' of '{resource.tenant}' is registered with another {', '.join(wrong)}:"
        " say the same in the resource, or choose another name for the model"
    )
