"""Quotas of tenants."""

from __future__ import annotations

from fastapi import APIRouter

from anamorph.wire.admin import TenantQuota, TenantQuotaPatch
from anamorph_keysvc.deps import Do, Platform, PlatformOrAdmin, TenantId, TheService
from anamorph_keysvc.service import lookup, quotas

router = APIRouter(prefix="/v1/tenants/{tenant}/quota", tags=["tenants"])


@router.get("")
def get_quota(caller: PlatformOrAdmin, tenant: TenantId, service: TheService) -> TenantQuota:
    """How many objects a tenant may have."""
    with service.database.read(caller.scope) as session:
        return quotas.of(lookup.tenant(session, tenant))


@router.patch("")
def update_quota(_: Platform, tenant: TenantId, body: TenantQuotaPatch, do: Do) -> TenantQuota:
    """Change some fields of a tenant's quota; null takes one back to its default."""
    return do(TenantQuota, lambda work: quotas.update(work, tenant, body))
