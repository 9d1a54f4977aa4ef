"""Tenants, API keys, audit."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path
from sqlmodel import col, select

from anamorph.wire.admin import (
    ApiKeyCreate,
    ApiKeyRead,
    ApiKeySecret,
    AuditRead,
    Page,
    TenantCreate,
    TenantRead,
)
from anamorph_keysvc import audit
from anamorph_keysvc.deps import Auditors, Do, Platform, PlatformOrAdmin, TenantId, TheService
from anamorph_keysvc.pages import DEFAULT_SIZE, PageSize, PageToken, page_of
from anamorph_keysvc.service import lookup, tenants
from anamorph_keysvc.tables import ApiKey, Audit, Tenant

router = APIRouter(prefix="/v1/tenants", tags=["tenants"])


@router.post("", status_code=201)
def create_tenant(_: Platform, body: TenantCreate, do: Do) -> TenantRead:
    """Create a tenant."""
    return do(TenantRead, lambda work: tenants.create_tenant(work, body))


@router.get("")
def list_tenants(
    caller: Platform, service: TheService, page: PageToken = None, limit: PageSize = DEFAULT_SIZE
) -> Page[TenantRead]:
    """All tenants."""
    with service.database.read(caller.scope) as session:
        return page_of(session, select(Tenant), (col(Tenant.id),), lookup.tenant_read, page, limit)


@router.get("/{tenant}")
def get_tenant(caller: Platform, tenant: TenantId, service: TheService) -> TenantRead:
    """One tenant."""
    with service.database.read(caller.scope) as session:
        return lookup.tenant_read(lookup.tenant(session, tenant))


@router.post("/{tenant}/api-keys", status_code=201)
def create_api_key(_: PlatformOrAdmin, tenant: TenantId, body: ApiKeyCreate, do: Do) -> ApiKeySecret:
    """Create an API key; the answer is the only one that shows it. Takes no Idempotency-Key."""
    return do.secret(lambda work: tenants.create_api_key(work, tenant, body))


@router.get("/{tenant}/api-keys")
def list_api_keys(
    caller: PlatformOrAdmin,
    tenant: TenantId,
    service: TheService,
    page: PageToken = None,
    limit: PageSize = DEFAULT_SIZE,
) -> Page[ApiKeyRead]:
    """A tenant's API keys, without the keys themselves."""
    with service.database.read(caller.scope) as session:
        lookup.tenant(session, tenant)
        mine = select(ApiKey).where(ApiKey.tenant == tenant)
        return page_of(session, mine, (col(ApiKey.id),), lookup.api_key_read, page, limit)


@router.delete("/{tenant}/api-keys/{key}")
def revoke_api_key(
    _: PlatformOrAdmin, tenant: TenantId, key: Annotated[str, Path(max_length=64)], do: Do
) -> ApiKeyRead:
    """Revoke an API key; revoking it again changes nothing."""
    return do(ApiKeyRead, lambda work: tenants.revoke_api_key(work, tenant, key))


@router.get("/{tenant}/audit")
def read_audit(
    caller: Auditors,
    tenant: TenantId,
    service: TheService,
    page: PageToken = None,
    limit: PageSize = DEFAULT_SIZE,
) -> Page[AuditRead]:
    """A tenant's audit log, oldest first."""
    with service.database.read(caller.scope) as session:
        mine = select(Audit).where(Audit.tenant == tenant)
        return page_of(session, mine, (col(Audit.sequence),), audit.read, page, limit)
