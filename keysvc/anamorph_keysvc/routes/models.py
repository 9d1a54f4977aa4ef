"""Models, rotation policies, rotation, inference tokens."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response
from sqlmodel import col, select

from anamorph.wire.admin import (
    InferenceTokenRead,
    ModelCreate,
    ModelPatch,
    ModelRead,
    Page,
    Role,
    RotationPolicy,
    RotationPolicyPatch,
    RotationRead,
)
from anamorph.wire.ids import LABEL
from anamorph_keysvc.deps import (
    Anyone,
    Do,
    ModelId,
    PlatformOrAdmin,
    Rotators,
    TenantId,
    TheService,
    TokenHolders,
    tag,
)
from anamorph_keysvc.pages import DEFAULT_SIZE, PageSize, PageToken, page_of
from anamorph_keysvc.service import lookup, preparation, rotation, tenants, tokens
from anamorph_keysvc.tables import Model

router = APIRouter(prefix="/v1/tenants/{tenant}", tags=["models"])

OPERATOR = "operator"


@router.post("/models", status_code=201)
def create_model(
    _: PlatformOrAdmin, tenant: TenantId, body: ModelCreate, do: Do, response: Response
) -> ModelRead:
    """Register a model."""
    return do.model(response, lambda work: tenants.create_model(work, tenant, body))


@router.get("/models")
def list_models(
    caller: Anyone,
    tenant: TenantId,
    service: TheService,
    page: PageToken = None,
    limit: PageSize = DEFAULT_SIZE,
) -> Page[ModelRead]:
    """A tenant's models."""
    with service.database.read(caller.scope) as session:
        lookup.tenant(session, tenant)
        mine = select(Model).where(Model.tenant == tenant)
        return page_of(session, mine, (col(Model.id),), lookup.model_read, page, limit)


@router.get("/models/{model}")
def get_model(
    caller: Anyone, tenant: TenantId, model: ModelId, service: TheService, response: Response
) -> ModelRead:
    """One model, with its ETag."""
    with service.database.read(caller.scope) as session:
        return tag(response, lookup.model_read(lookup.model(session, tenant, model)))


@router.patch("/models/{model}")
def update_model(
    _: PlatformOrAdmin, tenant: TenantId, model: ModelId, body: ModelPatch, do: Do, response: Response
) -> ModelRead:
    """Change some fields of a model. Existing versions stay as they are: the next one has the change."""
    return do.model(response, lambda work: tenants.update_model(work, tenant, model, do.expected, body))


@router.get("/models/{model}/rotation-policy")
def get_policy(
    caller: PlatformOrAdmin, tenant: TenantId, model: ModelId, service: TheService
) -> RotationPolicy:
    """A model's rotation policy."""
    with service.database.read(caller.scope) as session:
        return lookup.policy_of(lookup.model(session, tenant, model))


@router.patch("/models/{model}/rotation-policy")
def update_policy(
    _: PlatformOrAdmin, tenant: TenantId, model: ModelId, body: RotationPolicyPatch, do: Do
) -> RotationPolicy:
    """Change some fields of a model's rotation policy."""
    return do(RotationPolicy, lambda work: tenants.update_policy(work, tenant, model, body))


@router.post("/models/{model}/keys:rotate", status_code=202)
def rotate(_: Rotators, tenant: TenantId, model: ModelId, do: Do, service: TheService) -> RotationRead:
    """Begin a rotation; 409 while one of this model is in flight."""
    operation = do(RotationRead, lambda work: rotation.rotate(work, tenant, model))
    preparation.prepare_at_once(service, operation.id)
    return operation


@router.post("/models/{model}/inference-tokens")
def issue_inference_token(
    caller: TokenHolders,
    tenant: Annotated[str, Path(pattern=f"^{LABEL}$")],
    model: ModelId,
    service: TheService,
    do: Do,
) -> InferenceTokenRead:
    """A short-lived token for the inference endpoint; the tenant ``plaintext`` is the platform's."""
    do.refuse_key()
    platform = caller.role is Role.PLATFORM
    return tokens.issue(service, caller, tenant, model, OPERATOR if platform else caller.actor)
