"""Tenants, models, rotation policies and API keys."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from anamorph import errors
from anamorph.wire.admin import (
    ApiKeyCreate,
    ApiKeyRead,
    ApiKeySecret,
    ModelCreate,
    ModelPatch,
    ModelRead,
    Role,
    RotationPolicy,
    RotationPolicyPatch,
    TenantCreate,
    TenantRead,
)
from anamorph.wire.states import State
from anamorph_keysvc import credentials
from anamorph_keysvc.service import lookup, quotas, schedule
from anamorph_keysvc.service.transition import change, require
from anamorph_keysvc.service.work import Work, found
from anamorph_keysvc.tables import ApiKey, Model, Tenant


def create_tenant(work: Work, body: TenantCreate) -> TenantRead:
    """Create a tenant.

    Raises:
        Conflict: it exists.
    """
    if work.session.get(Tenant, body.id) is not None:
        raise errors.Conflict(f"tenant '{body.id}' exists", code="exists")
    row = Tenant(**body.model_dump(), kek=f"t-{work.entropy(16).hex()}", created_at=work.now)
    work.session.add(row)
    work.session.flush()
    work.record(row.id, "tenant.create", row.id)
    return lookup.tenant_read(row)


def create_model(work: Work, tenant: str, body: ModelCreate) -> ModelRead:
    """Register a model.

    Raises:
        Conflict: it exists, or the tenant has too many, or they ask for too much together.
    """
    lookup.tenant(work.session, tenant)
    if work.session.get(Model, (tenant, body.id)) is not None:
        raise errors.Conflict(f"model '{body.id}' exists", code="exists")
    row = Model(tenant=tenant, **body.model_dump(), created_at=work.now)
    work.session.add(row)
    work.session.flush()
    work.record(
        tenant, "model.create", row.id, base=row.base, base_digest=row.base_digest, profile=row.profile
    )
    quotas.check(work, tenant, "models")
    quotas.check_serving(work, tenant, row.id)
    return lookup.model_read(row)


def update_model(work: Work, tenant: str, model: str, expected: int | None, patch: ModelPatch) -> ModelRead:
    """Change a model's record. Versions keep what they were issued under: the next one has the change.

    Raises:
        PreconditionFailed: not the record that the caller read.
        Unprocessable: another base under the old one's digest.
        Conflict: the tenant's models would ask for too much together.
    """
    row = lookup.model(work.session, tenant, model)
    require(row, expected)
    before, changes = quotas.asked(work, tenant)[model], patch.changes()
    if row.base_digest and changes.get("base", row.base) != row.base and "base_digest" not in changes:
        raise errors.Unprocessable(
            "base_digest is that of the old base: give the new one's, or null",
            code="base_digest_needed",
            param="base_digest",
        )
    row.sqlmodel_update(changes)
    work.session.add(row)
    work.session.flush()
    work.record(tenant, "model.update", model, **_told(changes))
    quotas.check_serving(work, tenant, model, before)
    return lookup.model_read(row)


def _told(changes: dict[str, Any]) -> dict[str, str | int | None]:
    """Changes as an audit row has them: plain values, so what has fields of its own is its JSON."""
    return {
        name: json.dumps(value, sort_keys=True) if isinstance(value, dict) else value
        for name, value in changes.items()
    }


def update_policy(work: Work, tenant: str, model: str, patch: RotationPolicyPatch) -> RotationPolicy:
    """Change some fields of a model's rotation policy; those already running keep their deadlines.

    Raises:
        Unprocessable: the policy as a whole would not hold, for example a grace too short.
    """
    row = lookup.model(work.session, tenant, model)
    changes = patch.model_dump(exclude_unset=True)
    try:
        policy = RotationPolicy.model_validate(row.policy | changes)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise errors.Unprocessable(first["msg"], code="invalid_policy", param=field or None) from None
    row.policy = policy.model_dump()
    work.session.add(row)
    active = lookup.in_states(work.session, row, State.ACTIVE)
    if active is not None and active.activated_at is not None:
        change(work, active, **schedule.of(work.entropy, policy, active.activated_at))
    work.record(tenant, "policy.update", model, **changes)
    return policy


def create_api_key(work: Work, tenant: str, body: ApiKeyCreate) -> ApiKeySecret:
    """Create an API key; its secret is in this answer and nowhere else.

    Raises:
        Unprocessable: a platform key, which belongs to no tenant.
    """
    if body.role is Role.PLATFORM:
        raise errors.Unprocessable(
            "a tenant's key cannot be a platform key", code="invalid_role", param="role"
        )
    lookup.tenant(work.session, tenant)
    secret = credentials.mint(credentials.API_KEY, work.entropy)
    row = ApiKey(
        id=work.fresh_id("key"),
        tenant=tenant,
        **body.model_dump(),
        hash=credentials.hashed(secret),
        created_at=work.now,
    )
    work.session.add(row)
    work.record(tenant, "api-key.create", row.id, role=row.role.value, name=row.name)
    quotas.check(work, tenant, "api_keys")
    return ApiKeySecret(**lookup.api_key_read(row).model_dump(), secret=secret)


def revoke_api_key(work: Work, tenant: str, key_id: str) -> ApiKeyRead:
    """Revoke an API key; again changes nothing."""
    row = work.session.get(ApiKey, key_id)
    row = found(row if row is not None and row.tenant == tenant else None, "API key")
    if row.revoked_at is None:
        row.revoked_at = work.now
        work.session.add(row)
        work.record(tenant, "api-key.revoke", key_id)
    return lookup.api_key_read(row)
