"""Which namespace may name which tenant: an admission policy, checked by the API server.

A namespace is bound by an annotation, which only those who may change namespaces can set.
The operator asks :func:`bound` the same, for clusters where somebody has removed the policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anamorph_operator.kubernetes.resources.definition import ENCRYPTED_MODEL
from anamorph_operator.kubernetes.resources.part import GROUP, VERSION

TENANTS = f"{GROUP}/tenants"
"""Annotation of a namespace: ids of tenants, with commas between them."""
NAME = f"tenant-of-namespace.{GROUP}"


def bound(annotations: Mapping[str, str], tenant: str) -> bool:
    """Whether a namespace with these annotations may name a tenant."""
    return tenant in [one.strip() for one in annotations.get(TENANTS, "").split(",")]


def policy() -> dict[str, Any]:
    """The ValidatingAdmissionPolicy; where it cannot be evaluated, the write is refused.

    What is being deleted may be written: else no finalizer would come off once a namespace is bound no more.
    """
    annotations = "namespaceObject.metadata.annotations"
    tenants = f"{annotations}['{TENANTS}'].split(',').map(t, t.trim())"
    known = f"has({annotations}) && '{TENANTS}' in {annotations}"
    going = "has(object.metadata.deletionTimestamp)"
    rule = {
        "apiGroups": [GROUP],
        "apiVersions": [VERSION],
        "operations": ["CREATE", "UPDATE"],
        "resources": [ENCRYPTED_MODEL.plural],
    }
    validation = {
        "expression": f"{going} || ({known} && object.spec.tenant in {tenants})",
        "messageExpression": (
            "'namespace ' + namespaceObject.metadata.name + ' is not bound to tenant ' + object.spec.tenant"
            f" + ': a cluster admin adds it to the annotation {TENANTS} of the namespace'"
        ),
        "reason": "Forbidden",
    }
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": NAME},
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {"resourceRules": [rule]},
            "validations": [validation],
        },
    }


def binding() -> dict[str, Any]:
    """The binding that puts the policy in force everywhere."""
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": NAME},
        "spec": {"policyName": NAME, "validationActions": ["Deny"]},
    }
