"""The ASGI application, built from the service that it serves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute
from starlette.middleware import Middleware

from anamorph.telemetry import Telemetry
from anamorph_keysvc import idempotency, problems
from anamorph_keysvc.deps import refuse_foreign
from anamorph_keysvc.idempotency import InFlight
from anamorph_keysvc.metrics import build_metrics
from anamorph_keysvc.middleware import BodyLimit, NoStore
from anamorph_keysvc.routes import models, operations, platform, tenants, versions
from anamorph_keysvc.service import usage
from anamorph_keysvc.service.work import Service

_log = logging.getLogger(__name__)

_PROBLEM: dict[int | str, dict[str, Any]] = {
    status: {
        "description": "A problem (RFC 9457)",
        "content": {problems.MEDIA_TYPE: {"schema": {"type": "object"}}},
    }
    for status in ("422", "default")
}


def build_app(service: Service, telemetry: Telemetry) -> FastAPI:
    """The application around ``service``; its life includes the service's own background work."""

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(_background(service))
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    app = FastAPI(
        title="Anamorph key service",
        version=version("anamorph"),
        lifespan=life,
        openapi_url=None,
        dependencies=[Depends(refuse_foreign)],
        generate_unique_id_function=_operation_id,
        middleware=[Middleware(NoStore), Middleware(BodyLimit, limit=service.limits.max_body_bytes)],
        responses=_PROBLEM,
    )
    app.state.service = service
    app.state.telemetry = telemetry
    app.state.metrics = build_metrics(telemetry.meter, service.database)
    app.state.in_flight = InFlight()
    problems.install(app)
    for module in (tenants, models, versions, operations, platform):
        app.include_router(module.router)
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name


async def _background(service: Service) -> None:
    """Begin due rotations and forget old answers, over and over."""
    while True:
        await asyncio.sleep(service.limits.background_interval_s)
        for job in (usage.rotate_due, idempotency.forget_old):
            try:
                await asyncio.to_thread(job, service)
            except Exception as error:  # noqa: BLE001 -- one bad round must not end all rotations
                _log.error("background work failed: %s", type(error).__name__)
