"""The ASGI application, built from the service that it serves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute
from starlette.middleware import Middleware

from anamorph.telemetry import Telemetry
from anamorph_keysvc import contract, problems
from anamorph_keysvc.deps import refuse_foreign
from anamorph_keysvc.idempotency import InFlight
from anamorph_keysvc.identity.bearer import Identity
from anamorph_keysvc.middleware import BodyLimit, Deadline, NoStore
from anamorph_keysvc.observe import ObservedWrapper, Observer, Requests, build_observer
from anamorph_keysvc.ratelimit import RateLimits
from anamorph_keysvc.routes import models, operations, platform, quotas, tenants, versions, webhooks
from anamorph_keysvc.service.work import Service
from anamorph_keysvc.webhooks.delivery import public_guard
from anamorph_keysvc.webhooks.guard import Guard
from anamorph_keysvc.webhooks.settings import WebhookSettings
from anamorph_keysvc.worker import JOBS, Job, Worker

TITLE = "Anamorph key service"
_ROUTERS = tuple(
    module.router for module in (tenants, models, versions, operations, platform, webhooks, quotas)
)


class KeyServiceApp(FastAPI):
    """The application, whose OpenAPI document is the whole contract."""

    def openapi(self) -> dict[str, Any]:
        """The API as OpenAPI."""
        if self.openapi_schema is None:
            contract.complete(super().openapi(), _ROUTERS)
        return self.openapi_schema or {}


def build_app(
    service: Service,
    telemetry: Telemetry,
    observer: Observer | None = None,
    *,
    identity: Identity | None = None,
    jobs: Sequence[Job] = JOBS,
    webhook_guard: Guard | None = None,
) -> FastAPI:
    """The application around ``service``; its life includes the service's own background work.

    ``identity`` knows who may call besides the holders of API keys and grants: nobody by default.
    """
    observer = observer or build_observer(telemetry, service.database, clock=service.clock)
    service = replace(service, wrapper=ObservedWrapper(service.wrapper, observer), phase=observer.phase)

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        with Worker(service, jobs, observer.round).running():
            yield

    app = KeyServiceApp(
        title=TITLE,
        version=version("anamorph"),
        lifespan=life,
        openapi_url=None,
        dependencies=[Depends(refuse_foreign)],
        generate_unique_id_function=_operation_id,
        middleware=[
            Middleware(Requests, observer=observer),
            Middleware(NoStore),
            Middleware(BodyLimit, limit=service.limits.max_body_bytes),
            Middleware(Deadline, seconds=service.limits.request_deadline_s),
        ],
    )
    app.state.service = service
    app.state.telemetry = telemetry
    app.state.identity = identity or Identity()
    app.state.observer = observer
    app.state.in_flight = InFlight()
    app.state.rate_limits = RateLimits(service.limits)
    app.state.webhook_guard = webhook_guard or public_guard(WebhookSettings())
    problems.install(app)
    for router in _ROUTERS:
        app.include_router(router)
    return app


def describe() -> dict[str, Any]:
    """The API as OpenAPI, without a service behind it."""
    app = KeyServiceApp(title=TITLE, version=version("anamorph"), generate_unique_id_function=_operation_id)
    for router in _ROUTERS:
        app.include_router(router)
    return app.openapi()


def _operation_id(route: APIRoute) -> str:
    return route.name
