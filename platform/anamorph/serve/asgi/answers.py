"""Error answers of the compute zone: OpenAI's shape, whatever went wrong and wherever."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import ceil
from typing import Any

from starlette.responses import Response

from anamorph import errors
from anamorph.wire import problems
from anamorph.wire.inference import KEY_ID_HEADER


class JSON(Response):
    """A JSON answer that no cache keeps."""

    media_type = "application/json"

    def __init__(
        self, content: Any, status_code: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(content, status_code, {"Cache-Control": "no-store", **(headers or {})})

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


def refusal(error: errors.ServiceError, key_id: str | None = None) -> JSON:
    """The answer for an error: status, body, ``Retry-After``, and the key id served here, if any."""
    headers = {} if key_id is None else {KEY_ID_HEADER: key_id}
    if error.retry_after is not None:
        headers["Retry-After"] = str(ceil(error.retry_after))
    status = problems.status_of(error)
    if status == 401:
        headers["WWW-Authenticate"] = 'Bearer error="invalid_token"'
    return JSON(problems.openai_error(error), status, headers)


def method_not_allowed(allowed: str) -> JSON:
    """405; not among the product's exceptions, since no client of ours ever provokes it."""
    error = errors.BadRequest(f"this path takes {allowed} only", code="method_not_allowed")
    return JSON(problems.openai_error(error), 405, {"Allow": allowed})


def internal_error() -> JSON:
    """500 without a word about its cause, which might quote the request."""
    error = errors.ServiceError("the server made a mistake; nothing was answered", code="internal_error")
    return JSON(problems.openai_error(error), 500)


def not_found() -> errors.NotFound:
    return errors.NotFound("there is nothing at this path", code="not_found")
