"""Operations of a tenant."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path
from sqlmodel import col, select

from anamorph.wire.admin import OperationRead, Page
from anamorph_keysvc.deps import Anyone, Do, Rotators, TenantId, TheService
from anamorph_keysvc.pages import DEFAULT_SIZE, PageSize, PageToken, page_of
from anamorph_keysvc.service import lookup, rotation
from anamorph_keysvc.tables import Operation

router = APIRouter(prefix="/v1/tenants/{tenant}/operations", tags=["operations"])

OperationId = Annotated[str, Path(max_length=64, pattern=r"^[a-z0-9_]+$")]


@router.get("")
def list_operations(
    caller: Anyone,
    tenant: TenantId,
    service: TheService,
    page: PageToken = None,
    limit: PageSize = DEFAULT_SIZE,
) -> Page[OperationRead]:
    """A tenant's operations, oldest first."""
    with service.database.read(caller.scope) as session:
        lookup.tenant(session, tenant)
        mine = select(Operation).where(Operation.tenant == tenant)
        return page_of(session, mine, (col(Operation.id),), lookup.operation_read, page, limit)


@router.get("/{operation:id}")
def get_operation(
    caller: Anyone, tenant: TenantId, operation: OperationId, service: TheService
) -> OperationRead:
    """One operation."""
    with service.database.read(caller.scope) as session:
        return lookup.operation_read(lookup.operation(session, tenant, operation))


@router.post("/{operation:id}:cancel")
def cancel_operation(_: Rotators, tenant: TenantId, operation: OperationId, do: Do) -> OperationRead:
    """Cancel a rotation that is not active yet: its version becomes FAILED."""
    return do(OperationRead, lambda work: rotation.cancel(work, tenant, operation))
