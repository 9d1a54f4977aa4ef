"""The HTTP surface of one application: routes behind the middleware, no Ray in sight."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from anamorph.errors import Unavailable, Unprocessable
from anamorph.serve.api.completions import complete
from anamorph.serve.api.endpoint import Endpoint
from anamorph.serve.api.requests import PLAINTEXT
from anamorph.serve.asgi.answers import JSON, method_not_allowed, not_found
from anamorph.serve.asgi.connection import lifespan, relative_path
from anamorph.serve.asgi.middleware import Answers, Authentication, BodyLimit, KeyIdHeader, KeyStatus

Handler = Callable[[Endpoint, Request], Awaitable[Response]]


def build_app(endpoint: Endpoint) -> ASGIApp:
    """The ASGI application of one endpoint."""
    settings = endpoint.settings
    app: ASGIApp = _Routes(endpoint)
    app = KeyIdHeader(app, settings.key_id)
    app = KeyStatus(app, lambda: endpoint.state)
    app = Authentication(app, lambda: endpoint.verifier, settings)
    app = BodyLimit(app, settings.max_body_bytes)
    return Answers(app, settings.key_id)


class _Routes:
    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await lifespan(receive, send)
        if scope["type"] != "http":
            raise not_found()
        request = Request(scope, receive, send)
        path = relative_path(scope)
        if path not in ROUTES:
            raise not_found()
        method, handler = ROUTES[path]
        if request.method != method:
            return await method_not_allowed(method)(scope, receive, send)
        try:
            response = await handler(self._endpoint, request)
            await response(scope, receive, send)
        except ClientDisconnect:
            pass  # nobody is left to be answered
        return None


async def _models(endpoint: Endpoint, _: Request) -> Response:
    model = {
        "id": endpoint.settings.model,
        "object": "model",
        "created": endpoint.created,
        "owned_by": endpoint.settings.tenant,
        "key_id": endpoint.settings.key_id,
        "vocab_size": endpoint.limits.vocab_size,
        "max_model_len": endpoint.limits.context_length,
    }
    return JSON({"object": "list", "data": [model]})


async def _health(endpoint: Endpoint, _: Request) -> Response:
    if not endpoint.engine.healthy():
        raise Unavailable("the engine does not compute", code="unavailable", retry_after=5)
    return JSON({"status": "ok"})


async def _metrics(endpoint: Endpoint, _: Request) -> Response:
    return Response(endpoint.telemetry.prometheus(), media_type="text/plain; version=0.0.4")


async def _usage(endpoint: Endpoint, _: Request) -> Response:
    return JSON(endpoint.admission.usage().model_dump(mode="json"))


async def _text_only(endpoint: Endpoint, request: Request) -> Response:  # noqa: ARG001
    raise Unprocessable(PLAINTEXT, code="plaintext_refused")


ROUTES: dict[str, tuple[str, Handler]] = {
    "/v1/completions": ("POST", complete),
    # Clients that speak chat send text; say what is wrong instead of "not found".
    "/v1/chat/completions": ("POST", _text_only),
    "/v1/models": ("GET", _models),
    "/healthz": ("GET", _health),
    "/metrics": ("GET", _metrics),
    "/usage": ("GET", _usage),
}
