"""Every error as an RFC 9457 problem, the framework's own included."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.routing import Match

from anamorph import errors
from anamorph.wire import problems

MEDIA_TYPE = "application/problem+json"

_log = logging.getLogger(__name__)


class Fault(BaseModel):
    """One field of a request that does not fit."""

    field: str
    reason: str


class Problem(BaseModel):
    """Body of every error answer (RFC 9457).

    ``code`` is what programs go by, ``param`` the field or parameter at fault;
    ``errors`` comes with the code ``invalid_request``.
    """

    type: str = Field(json_schema_extra={"format": "uri-reference"})
    title: str
    status: int = Field(ge=400, le=599)
    detail: str
    code: str = ""
    param: str = ""
    errors: list[Fault] = Field(default=[], max_length=20)


def install(app: FastAPI) -> None:
    """Answer every exception of ``app`` as a problem."""
    app.add_exception_handler(errors.AnamorphError, _ours)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _framework)
    app.add_exception_handler(Exception, _unexpected)


def answer(error: errors.ServiceError, **more: Any) -> JSONResponse:
    """The problem that belongs to an exception."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(int(error.retry_after))
    if isinstance(error, errors.Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    body = {**problems.problem(error), **more}
    return JSONResponse(body, problems.status_of(error), headers, MEDIA_TYPE)


async def _ours(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, errors.ServiceError):
        return answer(error)
    if isinstance(error, errors.SetupError):
        # Says which file or role of this process is wrong, which is for its log only.
        _log.error("not set up: %s", error)
        return answer(errors.Unavailable("this process is not set up; its log says why", code="not_ready"))
    if isinstance(error, errors.InvalidId):
        return answer(errors.Unprocessable(str(error), code="invalid_id"))
    return await _unexpected(request, error)


async def _invalid(_request: Request, error: Exception) -> JSONResponse:
    """Which fields are wrong and why, but never what they held."""
    found = error.errors() if isinstance(error, RequestValidationError) else []
    faults = [
        {"field": ".".join(str(part) for part in item["loc"]), "reason": str(item["msg"])} for item in found
    ]
    param = faults[0]["field"] if faults else None
    return answer(
        errors.Unprocessable("the request does not fit the API", code="invalid_request", param=param),
        errors=faults[:20],
    )


async def _framework(request: Request, error: Exception) -> JSONResponse:
    """What Starlette and FastAPI answer by themselves: unknown route, method, oversized body."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(getattr(error, "headers", None) or {})
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = _allowed(request)
    kind = problems.STATUS.get(status)
    if kind is not None:
        plain = answer(kind(HTTPStatus(status).phrase, code=_CODES.get(status)))
        plain.headers.update(headers)
        return plain
    phrase = HTTPStatus(status).phrase
    body = {"type": "about:blank", "title": phrase, "status": status, "detail": phrase}
    return JSONResponse(body, status, headers, MEDIA_TYPE)


def _allowed(request: Request) -> str:
    """The methods of a path. Starlette names those of the first route that has it; ours have one each."""
    tried = {method: {**request.scope, "method": method} for method in ("DELETE", "GET", "PATCH", "POST")}
    return ", ".join(
        method
        for method, scope in tried.items()
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)
    )


_CODES = {400: "unreadable_body", 404: "no_route", 413: "body_too_large"}


async def _unexpected(_request: Request, error: Exception) -> JSONResponse:
    # The type only: a message may quote what the service was working on.
    _log.error("unexpected %s", type(error).__name__)
    body = {
        "type": "about:blank",
        "title": "Internal Server Error",
        "status": 500,
        "detail": "the key service failed; its log says where",
    }
    return JSONResponse(body, 500, media_type=MEDIA_TYPE)
