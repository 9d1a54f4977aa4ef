"""The one table between HTTP status and exception, and the two error shapes.

The key service answers RFC 9457 problem details; inference endpoints answer
OpenAI's ``{"error": {…}}``. Both are read back into the same exceptions.
"""

from __future__ import annotations

from typing import Any

from anamorph import errors

STATUS: dict[int, type[errors.ServiceError]] = {
    400: errors.BadRequest,
    401: errors.Unauthenticated,
    403: errors.Forbidden,
    404: errors.NotFound,
    409: errors.Conflict,
    410: errors.Gone,
    412: errors.PreconditionFailed,
    413: errors.TooLarge,
    422: errors.Unprocessable,
    429: errors.TooManyRequests,
    503: errors.Unavailable,
}
_BY_CLASS = {error: status for status, error in STATUS.items()}

# Statuses after which the same request may be sent again.
RETRYABLE = frozenset({429, 502, 503, 504})


def status_of(error: errors.ServiceError) -> int:
    """HTTP status of an exception; 500 for the bare base class."""
    return _BY_CLASS.get(type(error), 500)


def openai_error(error: errors.ServiceError) -> dict[str, Any]:
    """Body of an inference endpoint's error answer, in OpenAI's shape."""
    status = status_of(error)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def problem(error: errors.ServiceError) -> dict[str, Any]:
    """Body of a key service's error answer (RFC 9457, ``application/problem+json``)."""
    status = status_of(error)
    title = type(error).__doc__ or ""
    body: dict[str, Any] = {
        "type": f"https://anamorph.dev/problems/{error.code or status}",
        "title": title.partition(": ")[2].rstrip(".") or "error",
        "status": status,
        "detail": str(error),
    }
    if error.code:
        body["code"] = error.code
    if error.param:
        body["param"] = error.param
    return body


def raise_for(status: int, body: Any, retry_after: str | None = None) -> None:
    """Raise the exception for an error answer; return for a status below 400.

    Args:
        status: HTTP status.
        body: decoded JSON of the answer, or anything else if it was not JSON.
        retry_after: value of the ``Retry-After`` header in seconds, if present.
    """
    if status < 400:
        return
    fields = body.get("error", body) if isinstance(body, dict) else {}
    fields = fields if isinstance(fields, dict) else {}
    message = fields.get("message") or fields.get("detail") or f"the service answered {status}"
    raise STATUS.get(status, errors.ServiceError)(
        str(message),
        code=fields.get("code"),
        param=fields.get("param"),
        retry_after=float(retry_after) if retry_after and retry_after.isdigit() else None,
    )
