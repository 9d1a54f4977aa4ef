"""What every part of a custom resource has in common: names as Kubernetes writes them, no guessing."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

GROUP = "anamorph.dev"
VERSION = "v1alpha1"

Label = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$", max_length=63)]
"""The grammar of ids everywhere (``wire.ids``), which is also that of Kubernetes' own labels."""
Url = Annotated[str, Field(pattern=r"^https?://[^\s/@?#]+(/[^\s?#]*)?$", max_length=2000)]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]i?)?$", max_length=32)]


def rule(expression: str, message: str, path: str | None = None) -> dict[str, str]:
    """A validation in the Common Expression Language, checked by the API server at every write.

    Args:
        expression: over ``self`` and, for changes, ``oldSelf``.
        message: what is wrong and what to do.
        path: field that the error names, as ``.spec.tenant``; by default the part that has the rule.
    """
    found = {"rule": expression, "message": message}
    return found if path is None else {**found, "fieldPath": path}


def rules(*of: dict[str, str]) -> dict[str, Any]:
    """``json_schema_extra`` of a part with these validations."""
    return {"x-kubernetes-validations": list(of)}


def immutable(what: str) -> dict[str, Any]:
    """``json_schema_extra`` of a field that never changes; another value is another object.

    A field that may be absent needs its rule on the part that holds it: the API server runs none on what
    is not there.
    """
    return rules(rule("self == oldSelf", f"{what} never changes: make another object"))


def unchanged(*fields: str, why: str) -> dict[str, str]:
    """A rule of a part: these of its fields never change, nor come, nor go.

    Args:
        fields: names in the object.
        why: what to do instead.
    """
    same = (
        f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || self.{name} == oldSelf.{name})"
        for name in fields
    )
    return rule(" && ".join(same), f"{', '.join(fields)} never change: {why}")


class Part(BaseModel):
    """Base of everything in a resource: immutable here, unknown fields refused, camel case outside."""

    model_config = ConfigDict(
        alias_generator=to_camel, validate_by_name=True, validate_by_alias=True, extra="forbid", frozen=True
    )

    def manifest(self) -> dict[str, Any]:
        """As Kubernetes takes it; what is absent is left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class Condition(Part):
    """One condition, as Kubernetes' conventions want it (``metav1.Condition``)."""

    type: Annotated[str, Field(max_length=64)]
    status: Literal["True", "False", "Unknown"]
    reason: Annotated[str, Field(pattern=r"^[A-Z][A-Za-z]*$", max_length=64)]
    message: Annotated[str, Field(max_length=1024)] = ""
    last_transition_time: AwareDatetime
    observed_generation: Annotated[int, Field(ge=0)]
