"""What routes ask for in their signatures: who may call, on what, and how the work is done.

What touches the database is a plain function, which FastAPI runs in a thread; the
rest is ``async``, only to be spared that hop.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from fastapi import Depends, Header, Path, Request, Response
from pydantic import BaseModel

from anamorph import errors
from anamorph.wire.admin import KeyVersionRead, ModelRead, Role
from anamorph.wire.ids import Label
from anamorph_keysvc import idempotency
from anamorph_keysvc.credentials import Caller, holder
from anamorph_keysvc.idempotency import InFlight
from anamorph_keysvc.identity.bearer import Identity
from anamorph_keysvc.identity.unverified import refused
from anamorph_keysvc.observe import Observer
from anamorph_keysvc.ratelimit import RateLimits, kind_of
from anamorph_keysvc.service.work import Service, Work

T = TypeVar("T", bound=BaseModel)
Tagged = TypeVar("Tagged", KeyVersionRead, ModelRead)

_ETAG = re.compile(r'"([0-9]{1,9})"')


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _observer(request: Request) -> Observer:
    observer: Observer = request.app.state.observer
    return observer


TheService = Annotated[Service, Depends(_service)]
TheObserver = Annotated[Observer, Depends(_observer)]


# What every request asks for is read off the request: each dependency more takes the framework a while.


async def refuse_foreign(request: Request) -> None:
    """Refuse a credential that is not ours, such as an inference token, even where none is needed."""
    identity: Identity = request.app.state.identity
    authorization = request.headers.get("authorization")
    if authorization is not None and not identity.looks_like_ours(authorization):
        raise refused()


def _authenticated(request: Request) -> Caller:
    service: Service = request.app.state.service
    identity: Identity = request.app.state.identity
    limits: RateLimits = request.app.state.rate_limits
    authorization = request.headers.get("authorization")
    address = request.client.host if request.client is not None else None
    with limits.attempt(address, authorization):
        caller = identity.authenticate(lambda secret: holder(service.database, secret), authorization)
    limits.check(caller, kind_of(request.method, request.scope["path"]))
    return caller


Authenticated = Annotated[Caller, Depends(_authenticated)]


class Allow:
    """Admits callers of some roles, to their own tenant only; the platform to every tenant."""

    def __init__(self, *roles: Role, grant: bool = False) -> None:
        self.roles = frozenset(roles)
        self.grant = grant

    async def __call__(self, request: Request, caller: Authenticated) -> Caller:
        """The caller.

        Raises:
            Unauthenticated: a grant where none is taken.
            NotFound: another tenant's object.
            Forbidden: the caller's role is not among those admitted.
        """
        if caller.grant is not None:
            if not self.grant:
                raise errors.Unauthenticated("a grant is not taken here", code="unauthenticated")
            return caller
        tenant = request.path_params.get("tenant")
        if caller.role is not Role.PLATFORM and tenant not in {None, caller.tenant}:
            raise errors.NotFound("no such tenant", code="not_found")
        if caller.role not in self.roles:
            raise errors.Forbidden("this key's role does not admit that", code="forbidden")
        return caller


_TENANT_ROLES = (Role.ADMIN, Role.ROTATOR, Role.CLIENT, Role.MATERIALIZER, Role.AUDITOR)

Platform = Annotated[Caller, Depends(Allow(Role.PLATFORM))]
PlatformOrAdmin = Annotated[Caller, Depends(Allow(Role.PLATFORM, Role.ADMIN))]
Admin = Annotated[Caller, Depends(Allow(Role.ADMIN))]
AdminOrRotator = Annotated[Caller, Depends(Allow(Role.ADMIN, Role.ROTATOR))]
Rotators = Annotated[Caller, Depends(Allow(Role.ADMIN, Role.ROTATOR, Role.PLATFORM))]
Auditors = Annotated[Caller, Depends(Allow(Role.AUDITOR, Role.ADMIN))]
Anyone = Annotated[Caller, Depends(Allow(*_TENANT_ROLES, Role.PLATFORM))]
TokenHolders = Annotated[Caller, Depends(Allow(Role.CLIENT, Role.ADMIN, Role.PLATFORM))]
ClientOrGrant = Annotated[Caller, Depends(Allow(Role.CLIENT, Role.ADMIN, grant=True))]
PlatformOrGrant = Annotated[Caller, Depends(Allow(Role.PLATFORM, grant=True))]
PlatformOrMaterializer = Annotated[Caller, Depends(Allow(Role.PLATFORM, Role.MATERIALIZER))]
GrantOnly = Annotated[Caller, Depends(Allow(grant=True))]

TenantId = Annotated[Label, Path()]
ModelId = Annotated[Label, Path()]
Version = Annotated[int, Path(ge=1, le=999_999_999)]


async def _version_path(tenant: TenantId, model: ModelId, version: Version) -> tuple[str, str, int]:
    return tenant, model, version


At = Annotated[tuple[str, str, int], Depends(_version_path)]


@dataclass(frozen=True)
class Mutation:
    """Does a change for its caller: one transaction, under the Idempotency-Key if there is one."""

    service: Service
    caller: Caller
    key: str | None
    request_digest: str
    in_flight: InFlight
    if_match: int | None
    _compared: list[int | None] = field(default_factory=list)

    @property
    def expected(self) -> int | None:
        """The row version of an If-Match, for whoever compares it."""
        self._compared.append(self.if_match)
        return self.if_match

    def __call__(self, answer: type[T], action: Callable[[Work], T]) -> T:
        """What ``action`` answers, or answered the first time."""
        if self.key is None:
            with self.work() as work:
                return self._act(work, action)
        with self.in_flight.hold(self.caller.actor, self.key), self.work() as work:
            return idempotency.once(
                work, self.key, self.request_digest, answer, lambda first: self._act(first, action)
            )

    def version(self, response: Response, action: Callable[[Work], KeyVersionRead]) -> KeyVersionRead:
        """As a call, for what answers a key version, whose ETag it sets."""
        return tag(response, self(KeyVersionRead, action))

    def model(self, response: Response, action: Callable[[Work], ModelRead]) -> ModelRead:
        """As a call, for what answers a model, whose ETag it sets."""
        return tag(response, self(ModelRead, action))

    def secret(self, action: Callable[[Work], T]) -> T:
        """As a call, for an answer that holds a secret and so must not be stored.

        Raises:
            BadRequest: the caller sent an Idempotency-Key.
        """
        self.refuse_key()
        with self.work() as work:
            return self._act(work, action)

    def _act(self, work: Work, action: Callable[[Work], T]) -> T:
        """Act, and undo it if the caller relies on a comparison that was not made."""
        answer = action(work)
        if self.if_match is not None and not self._compared:
            raise errors.BadRequest("this call takes no If-Match", code="if_match_not_supported")
        return answer

    def work(self) -> AbstractContextManager[Work]:
        """A write transaction on the caller's behalf, in the caller's scope."""
        return self.service.work(self.caller.actor, self.caller.scope)

    def refuse_key(self) -> None:
        """Refuse an Idempotency-Key.

        Raises:
            BadRequest: the caller sent one.
        """
        if self.key is not None:
            raise errors.BadRequest(
                "this answer holds a secret and is not kept: send no Idempotency-Key",
                code="idempotency_not_supported",
            )


def tag(response: Response, read: Tagged) -> Tagged:
    """What is answered, with its ETag set."""
    response.headers["ETag"] = f'"{read.row_version}"'
    return read


def _expected(if_match: str | None) -> int | None:
    if if_match is None or if_match.strip() == "*":
        return None
    match = _ETAG.fullmatch(if_match.strip())
    if match is None:
        raise errors.BadRequest('If-Match takes one strong ETag, such as "3"', code="invalid_if_match")
    return int(match[1])


async def _mutation(
    request: Request,
    caller: Authenticated,
    idempotency_key: Annotated[str | None, Header()] = None,
    if_match: Annotated[str | None, Header()] = None,
) -> Mutation:
    what = (request.method, request.url.path, if_match or "")
    return Mutation(
        request.app.state.service,
        caller,
        None if idempotency_key is None else idempotency.check_key(idempotency_key),
        idempotency.digest(*(part.encode() for part in what), await request.body()),
        request.app.state.in_flight,
        _expected(if_match),
    )


Do = Annotated[Mutation, Depends(_mutation)]
