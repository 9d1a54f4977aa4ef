"""What the operator sees of all tenants, and what needs no credential: public keys and health."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse
from sqlmodel import col, select

from anamorph import errors
from anamorph.wire.admin import BackupCreate, BackupRead, JwkSet, KeyVersionRead, ModelRead, Page
from anamorph.wire.states import State
from anamorph_keysvc.deps import Do, Platform, TheService
from anamorph_keysvc.pages import DEFAULT_SIZE, PageSize, PageToken, page_of
from anamorph_keysvc.scope import WORKER
from anamorph_keysvc.service import backups, lookup, tokens
from anamorph_keysvc.tables import KeyVersion, Model

router = APIRouter(tags=["platform"])

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


@router.get("/v1/versions")
def all_versions(
    caller: Platform,
    service: TheService,
    state: Annotated[list[State] | None, Query()] = None,
    due: bool = False,
    page: PageToken = None,
    limit: PageSize = DEFAULT_SIZE,
) -> Page[KeyVersionRead]:
    """Key versions of all tenants."""
    wanted = select(KeyVersion)
    if state:
        wanted = wanted.where(lookup.has_state(*state))
    if due:
        scheduled = lookup.has_state(State.DESTROY_SCHEDULED)
        wanted = wanted.where(scheduled, col(KeyVersion.destroy_at) <= service.clock())
    order = (col(KeyVersion.tenant), col(KeyVersion.model), col(KeyVersion.version))
    with service.database.read(caller.scope) as session:
        return page_of(session, wanted, order, lookup.version_read, page, limit)


@router.get("/v1/models")
def all_models(
    caller: Platform, service: TheService, page: PageToken = None, limit: PageSize = DEFAULT_SIZE
) -> Page[ModelRead]:
    """Models of all tenants."""
    order = (col(Model.tenant), col(Model.id))
    with service.database.read(caller.scope) as session:
        return page_of(session, select(Model), order, lookup.model_read, page, limit)


@router.get("/v1/inference-keys")
def inference_keys(service: TheService) -> JwkSet:
    """Public keys that inference tokens are verified with."""
    with service.database.read(WORKER) as session:
        return tokens.public_keys(session)


@router.post("/v1/inference-keys:rotate")
def rotate_inference_keys(_: Platform, do: Do, service: TheService) -> JwkSet:
    """Publish the next signing key of inference tokens. Takes no Idempotency-Key: 409 does as well."""
    do.refuse_key()
    return tokens.rotate_signing_key(service)


@router.post("/v1/backups", status_code=201)
def record_backup(_: Platform, body: BackupCreate, do: Do) -> BackupRead:
    """Note that a backup of the database was taken, and can be restored; older ones may become useless."""
    return do(BackupRead, lambda work: backups.record(work, body))


@router.get("/livez")
async def livez() -> dict[str, str]:
    """The process answers; says nothing of what it stands on."""
    return {"status": "alive"}


@router.get("/readyz")
def readyz(service: TheService) -> dict[str, str]:
    """Database, signing key and wrapper work."""
    service.wrapper.check()
    with service.database.read(WORKER) as session:
        ready = bool(tokens.public_keys(session).keys)
    if not ready:
        raise errors.Unavailable("there is no signing key: run 'anamorph-keysvc init'", code="not_ready")
    return {"status": "ready"}


@router.get("/metrics", include_in_schema=False)
def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(request.app.state.telemetry.prometheus(), media_type=PROMETHEUS)


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request) -> JSONResponse:
    """The API as OpenAPI."""
    app: FastAPI = request.app
    return JSONResponse(app.openapi())
