"""Key versions: what they are, and every step of their lives."""

from __future__ import annotations

from fastapi import APIRouter, Response
from sqlmodel import col, select

from anamorph import errors
from anamorph.wire import sealed
from anamorph.wire.admin import (
    Activation,
    Address,
    Failure,
    GrantCreate,
    GrantRead,
    KeyVersionRead,
    Materialized,
    OperationRead,
    Page,
    Progress,
    ReleaseRead,
    ReleaseRequest,
    UsageReport,
)
from anamorph_keysvc.credentials import Caller, GrantHolder
from anamorph_keysvc.deps import (
    Admin,
    AdminOrRotator,
    Anyone,
    At,
    ClientOrGrant,
    Do,
    GrantOnly,
    ModelId,
    Platform,
    PlatformOrAdmin,
    PlatformOrGrant,
    PlatformOrMaterializer,
    TenantId,
    TheObserver,
    TheService,
    tag,
)
from anamorph_keysvc.pages import DEFAULT_SIZE, PageSize, PageToken, page_of
from anamorph_keysvc.service import lifecycle, lookup, materialization, release, usage
from anamorph_keysvc.tables import KeyVersion

router = APIRouter(prefix="/v1/tenants/{tenant}/models/{model}/keys", tags=["keys"])


@router.get("")
def list_versions(
    caller: Anyone,
    tenant: TenantId,
    model: ModelId,
    service: TheService,
    page: PageToken = None,
    limit: PageSize = DEFAULT_SIZE,
) -> Page[KeyVersionRead]:
    """A model's key versions, oldest first."""
    with service.database.read(caller.scope) as session:
        lookup.model(session, tenant, model)
        mine = select(KeyVersion).where(KeyVersion.tenant == tenant, KeyVersion.model == model)
        return page_of(session, mine, (col(KeyVersion.version),), lookup.version_read, page, limit)


@router.get("/{version:int}")
def get_version(caller: Anyone, at: At, service: TheService, response: Response) -> KeyVersionRead:
    """One key version, with its ETag."""
    with service.database.read(caller.scope) as session:
        return tag(response, lookup.version_read(lookup.version(session, *at)))


@router.post("/{version:int}:suspend")
def suspend(_: AdminOrRotator, at: At, do: Do, response: Response) -> KeyVersionRead:
    """ACTIVE or DRAINING to SUSPENDED."""
    return do.version(response, lambda work: lifecycle.suspend(work, *at, do.expected))


@router.post("/{version:int}:resume")
def resume(_: AdminOrRotator, at: At, do: Do, response: Response) -> KeyVersionRead:
    """SUSPENDED to the state before."""
    return do.version(response, lambda work: lifecycle.resume(work, *at, do.expected))


@router.post("/{version:int}:revoke")
def revoke(_: PlatformOrAdmin, at: At, do: Do, response: Response) -> KeyVersionRead:
    """Anything living to COMPROMISED."""
    return do.version(response, lambda work: lifecycle.revoke(work, *at, do.expected))


@router.post("/{version:int}:destroy")
def destroy(_: PlatformOrAdmin, at: At, do: Do, response: Response) -> KeyVersionRead:
    """RETIRED, FAILED or COMPROMISED to DESTROY_SCHEDULED."""
    return do.version(response, lambda work: lifecycle.destroy(work, *at, do.expected))


@router.post("/{version:int}:restore")
def restore(_: Admin, at: At, do: Do, response: Response) -> KeyVersionRead:
    """DESTROY_SCHEDULED back to RETIRED."""
    return do.version(response, lambda work: lifecycle.restore(work, *at, do.expected))


@router.post("/{version:int}:activate")
def activate(_: PlatformOrAdmin, at: At, body: Activation, do: Do, response: Response) -> KeyVersionRead:
    """STAGED to ACTIVE, the previous ACTIVE version to DRAINING."""
    return do.version(response, lambda work: lifecycle.activate(work, *at, do.expected, body))


@router.post("/{version:int}:readdress")
def readdress(_: Platform, at: At, body: Address, do: Do, response: Response) -> KeyVersionRead:
    """Where clients reach an ACTIVE, DRAINING or SUSPENDED version, from now on; its state stays."""
    return do.version(response, lambda work: lifecycle.readdress(work, *at, do.expected, body))


@router.post("/{version:int}:retire")
def retire(_: Platform, at: At, do: Do, response: Response) -> KeyVersionRead:
    """DRAINING to RETIRED, not before ``drain_until``."""
    return do.version(response, lambda work: lifecycle.retire(work, *at, do.expected))


@router.post("/{version:int}:destroyed")
def destroyed(_: Platform, at: At, do: Do, response: Response) -> KeyVersionRead:
    """DESTROY_SCHEDULED to DESTROYED, not before ``destroy_at``; erases the root."""
    return do.version(response, lambda work: lifecycle.destroyed(work, *at, do.expected))


@router.post("/{version:int}:materialize")
def materialize(_: PlatformOrMaterializer, at: At, do: Do, body: GrantCreate | None = None) -> GrantRead:
    """A grant to read the root once, also for one part; an older one is void. Takes no Idempotency-Key."""
    return do.secret(lambda work: materialization.materialize(work, *at, do.expected, body))


@router.post(
    "/{version:int}:release",
    response_model=ReleaseRead,
    responses={410: {"description": "The version is no longer released."}},
)
def release_key(
    caller: ClientOrGrant, at: At, body: ReleaseRequest, do: Do, observer: TheObserver
) -> Response:
    """Key material, for the purpose that the credential admits. Takes no Idempotency-Key."""
    do.refuse_key()
    with observer.release(body.purpose):
        if body.purpose == "materialize":
            answer = release.to_job(do.service, _holder(caller), at, body.part)
        else:
            _no_grant(caller)
            answer = release.to_client(do.service, caller, at)
    if body.recipient is not None:
        answer = sealed.seal_release(answer, body.recipient)
    # As it is: the framework would validate it once more, in a thread of its own.
    return Response(answer.model_dump_json(), media_type="application/json")


@router.post("/{version:int}:progress")
def progress(caller: GrantOnly, at: At, body: Progress, do: Do) -> OperationRead:
    """How far the materialisation is."""
    return do(OperationRead, lambda work: materialization.progress(work, _holder(caller), *at, body))


@router.post("/{version:int}:stage")
def stage(caller: GrantOnly, at: At, body: Materialized, do: Do, response: Response) -> KeyVersionRead:
    """MATERIALIZING to STAGED with the published replica."""
    holder = _holder(caller)
    return do.version(response, lambda work: materialization.stage(work, holder, *at, body))


@router.post("/{version:int}:fail")
def fail(caller: PlatformOrGrant, at: At, body: Failure, do: Do, response: Response) -> KeyVersionRead:
    """To FAILED; the ACTIVE version stays as it is."""
    return do.version(response, lambda work: materialization.fail(work, caller.grant, *at, body))


@router.post("/{version:int}:usage")
def report_usage(_: Platform, at: At, body: UsageReport, do: Do, response: Response) -> KeyVersionRead:
    """Served tokens of one source; the highest count stands."""
    return do.version(response, lambda work: usage.report(work, *at, body))


def _holder(caller: Caller) -> GrantHolder:
    if caller.grant is None:
        raise errors.Forbidden("only the grant of a materialisation admits that", code="forbidden")
    return caller.grant


def _no_grant(caller: Caller) -> None:
    if caller.grant is not None:
        raise errors.Forbidden("a grant is for materialisation only", code="forbidden")
