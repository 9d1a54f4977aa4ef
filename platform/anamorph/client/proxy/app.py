"""The proxy's routes."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

from opentelemetry.trace import Span, SpanKind, Tracer, use_span
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from anamorph import errors
from anamorph.client.proxy import jobs, requests, shapes
from anamorph.client.proxy.answers import Delta, answer
from anamorph.client.proxy.guard import Guard
from anamorph.client.proxy.served import Models
from anamorph.client.proxy.settings import ProxySettings
from anamorph.client.proxy.sse import EventStream, event, until_disconnect
from anamorph.client.proxy.timed import timed
from anamorph.telemetry import InferenceMetrics, names, setup, traces
from anamorph.wire.inference import CompletionUsage

logger = logging.getLogger(__name__)

Events = AsyncGenerator[Delta | CompletionUsage]
Endpoint = Callable[[Request], Awaitable[Response]]


def create_app(settings: ProxySettings, models: Models | None = None) -> Starlette:
    """The proxy as an ASGI application.

    Args:
        settings: see there.
        models: opened already, in the same event loop; by default they are opened, and
            every tokenizer checked, when the application starts.
    """
    return Starlette(
        routes=[
            Route("/v1/chat/completions", _answering(_chat), methods=["POST"]),
            Route("/v1/completions", _answering(_completion), methods=["POST"]),
            Route("/v1/models", _answering(_list_models)),
            Route("/v1/models/{model}", _answering(_one_model)),
            Route("/healthz", _answering(_health)),
        ],
        middleware=[Middleware(Guard, local_api_key=settings.local_api_key)],
        exception_handlers={HTTPException: _http_error},
        lifespan=partial(_lifespan, settings=settings, models=models),
    )


@asynccontextmanager
async def _lifespan(app: Starlette, *, settings: ProxySettings, models: Models | None) -> AsyncIterator[None]:
    opened = models or await Models.open(settings)
    telemetry = setup("anamorph-proxy", otlp_endpoint=settings.otlp_endpoint)
    app.state.models, app.state.settings, app.state.telemetry = opened, settings, telemetry
    try:
        yield
    finally:
        await opened.close()
        await asyncio.to_thread(telemetry.shutdown)


def _answering(endpoint: Endpoint) -> Endpoint:
    """``endpoint`` with every error turned into an answer in OpenAI's shape."""

    async def answering(request: Request) -> Response:
        try:
            return await endpoint(request)
        except errors.AnamorphError as error:
            return shapes.error_response(error)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:  # noqa: BLE001 - a traceback could quote the caller's text
            logger.error("%s failed: %s", request.url.path, type(error).__name__)
            return shapes.error_response(errors.AnamorphError("the proxy failed; its log names the error"))

    return answering


async def _chat(request: Request) -> Response:
    wanted = requests.parse(requests.ChatRequest, await _json(request))
    served = request.app.state.models.get(wanted.model)
    length = await served.context_length()
    job = await asyncio.to_thread(jobs.chat_job, wanted, served.tokenizer, length)
    shape = shapes.ChatShape(
        _head("chatcmpl", wanted), logprobs=wanted.logprobs, include_usage=_wants_usage(wanted)
    )
    return await _respond(request, wanted, answer(served.client, served.tokenizer, job), shape)


async def _completion(request: Request) -> Response:
    wanted = requests.parse(requests.CompletionRequest, await _json(request))
    served = request.app.state.models.get(wanted.model)
    length = await served.context_length()
    job = await asyncio.to_thread(jobs.completion_job, wanted, served.tokenizer, length)
    shape = shapes.CompletionShape(
        _head("cmpl", wanted), logprobs=wanted.logprobs is not None, include_usage=_wants_usage(wanted)
    )
    return await _respond(request, wanted, answer(served.client, served.tokenizer, job), shape)


async def _list_models(request: Request) -> Response:
    models: Models = request.app.state.models
    return JSONResponse({"object": "list", "data": [_model_card(models, name) for name in models.served]})


async def _one_model(request: Request) -> Response:
    return JSONResponse(_model_card(request.app.state.models, request.path_params["model"]))


async def _health(request: Request) -> Response:  # noqa: ARG001 - a route takes its request
    return JSONResponse({"status": "ok"})


async def _http_error(request: Request, error: Exception) -> Response:  # noqa: ARG001 - as above
    """Starlette's own refusals (no such path, wrong method) in OpenAI's shape."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    body = {"message": "no such path or method here", "type": "invalid_request_error", "param": None}
    return JSONResponse({"error": {**body, "code": "not_found"}}, status)


async def _respond(
    request: Request, wanted: requests.Request, events: Events, shape: shapes.Shape
) -> Response:
    span, events = _span(request, wanted), timed(events, _metrics(request, wanted))
    try:
        with use_span(span, record_exception=False, set_status_on_exception=False):
            if wanted.stream:
                return await _streamed(request, wanted, events, shape, span)
            deltas, usage = await until_disconnect(request.receive, _collect(events))
    except BaseException as error:
        span.set_attribute(names.ERROR_TYPE, type(error).__name__)
        span.end()
        raise
    span.end()
    return JSONResponse(shape.whole(deltas, usage))


async def _streamed(
    request: Request, wanted: requests.Request, events: Events, shape: shapes.Shape, span: Span
) -> Response:
    # With the first event in hand, an error before it still has a status of its own.
    first = await until_disconnect(request.receive, anext(events))

    async def ended() -> None:
        await events.aclose()
        span.end()

    return EventStream(_stream(first, events, shape, usage=_wants_usage(wanted)), ended)


def _operation(wanted: requests.Request) -> str:
    return "chat" if isinstance(wanted, requests.ChatRequest) else "text_completion"


def _metrics(request: Request, wanted: requests.Request) -> InferenceMetrics:
    state = request.app.state
    return InferenceMetrics(
        state.telemetry.meter,
        state.settings.tenant,
        wanted.model,
        "encrypted",
        side="client",
        operation=_operation(wanted),
    )


def _span(request: Request, wanted: requests.Request) -> Span:
    operation = _operation(wanted)
    tracer: Tracer = request.app.state.telemetry.tracer
    return tracer.start_span(
        f"{operation} {wanted.model}",
        context=traces.extract(request.headers),
        kind=SpanKind.CLIENT,
        attributes={
            names.OPERATION: operation,
            names.REQUEST_MODEL: wanted.model,
            names.PROTECTION: "encrypted",
        },
    )


async def _collect(events: Events) -> tuple[list[Delta], CompletionUsage]:
    async with aclosing(events):
        found = [one async for one in events]
    usage = found.pop()
    assert isinstance(usage, CompletionUsage)  # noqa: S101 - answer() ends with it
    return [one for one in found if isinstance(one, Delta)], usage


async def _stream(
    first: Delta | CompletionUsage, rest: Events, shape: shapes.Shape, *, usage: bool
) -> AsyncGenerator[bytes]:
    async with aclosing(rest):
        try:
            for chunk in _chunks(first, shape, usage=usage):
                yield event(chunk)
            async for one in rest:
                for chunk in _chunks(one, shape, usage=usage):
                    yield event(chunk)
            yield event("[DONE]")
        except errors.AnamorphError as error:
            yield event(shapes.error_body(error)[1])
        except Exception as error:  # noqa: BLE001 - as in _answering
            logger.error("a stream failed: %s", type(error).__name__)
            yield event(shapes.error_body(errors.AnamorphError("the proxy failed; see its log"))[1])


def _chunks(one: Delta | CompletionUsage, shape: shapes.Shape, *, usage: bool) -> list[dict[str, Any]]:
    if isinstance(one, Delta):
        return list(shape.chunks(one))
    return [shape.usage(one)] if usage else []


def _wants_usage(wanted: requests.Request) -> bool:
    return wanted.stream_options is not None and wanted.stream_options.include_usage


def _head(prefix: str, wanted: requests.Request) -> shapes.Head:
    return shapes.Head(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), wanted.model)


def _model_card(models: Models, name: str) -> dict[str, Any]:
    record = models.get(name).record
    created = int(record.created_at.timestamp())
    return {"id": name, "object": "model", "created": created, "owned_by": record.tenant}


async def _json(request: Request) -> Any:
    """The body, if it is JSON of admissible size.

    The content type is checked because a foreign page can send any other without asking first.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise errors.BadRequest("send Content-Type: application/json", code="invalid_value")
    limit, body = request.app.state.settings.max_body_bytes, bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise errors.TooLarge(f"the body is larger than {limit} bytes", code="body_too_large")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise errors.BadRequest("the body is not JSON", code="invalid_value") from None
