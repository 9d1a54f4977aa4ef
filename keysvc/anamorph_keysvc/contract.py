"""The API as OpenAPI: what FastAPI reads off the routes, completed from their dependencies.

Who may call, which errors can come, which headers answers have and which call can
follow another are derived from the routes, so that the contract cannot say otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fastapi import APIRouter
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from anamorph.wire import problems as statuses
from anamorph.wire.admin import (
    ApiKeyRead,
    ApiKeySecret,
    DeliveryRead,
    KeyVersionRead,
    ModelRead,
    OperationRead,
    Role,
    RotationRead,
    TenantRead,
    WebhookRead,
    WebhookSecret,
)
from anamorph_keysvc.deps import Allow
from anamorph_keysvc.problems import MEDIA_TYPE, Problem

Document = dict[str, Any]

ROLES = "x-roles"
"""Extension of an operation: the roles that may call it, ``grant`` for a materialisation's grant."""
GRANT = "grant"

_SCHEMES: Document = {
    "apiKey": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "amk_…",
        "description": "API key of a tenant, or the platform's.",
    },
    "jwt": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "Token of a configured OIDC issuer, or of a Kubernetes service account.",
    },
    "grant": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "amg_…",
        "description": "Grant of one materialisation; good for its key version only.",
    },
}
_RETRY_AFTER: Document = {"schema": {"type": "integer", "minimum": 0}, "description": "Seconds to wait."}
_NO_STORE: Document = {"schema": {"const": "no-store"}, "required": True}
_ETAG: Document = {
    "schema": {"type": "string", "pattern": '^"[0-9]{1,9}"$'},
    "required": True,
    "description": "Row version of the key version or model, for If-Match.",
}
_ERROR_HEADERS: dict[int, Document] = {
    401: {"WWW-Authenticate": {"schema": {"const": "Bearer"}, "required": True}},
    409: {"Retry-After": _RETRY_AFTER},
    429: {"Retry-After": {**_RETRY_AFTER, "required": True}},
    503: {"Retry-After": _RETRY_AFTER},
}
_PARAMETERS: dict[str, Document] = {
    "tenant": {"description": "Id of the tenant."},
    "model": {"description": "Id of the model."},
    "version": {"description": "Number of the key version."},
    "operation": {"description": "Id of the operation."},
    "webhook": {"description": "Id of the webhook."},
    "key": {"description": "Id of the API key."},
    "state": {"description": "Only versions in one of these states."},
    "due": {"description": "Only versions that are to be destroyed by now."},
    "page": {"description": "The next_page of the answer before; the first page without."},
    "limit": {"description": "Most items of a page."},
    "idempotency-key": {
        "description": "The same request under the same key is done once. Refused where the answer"
        " holds a secret.",
        "schema": {"type": "string", "pattern": "^[!-~]{1,128}$"},
    },
    "if-match": {
        "description": "Only if the key version or model still has this ETag; otherwise 412.",
        "schema": {"type": "string", "pattern": r'^(\*|"[0-9]{1,9}")$'},
        "example": "*",
    },
}
_VERSION = {"tenant": "tenant", "model": "model", "version": "version"}
# Where an answer holds the path parameters of calls that can follow.
_FOLLOWED: dict[Any, Mapping[str, str]] = {
    TenantRead: {"tenant": "id"},
    ModelRead: {"tenant": "tenant", "model": "id"},
    KeyVersionRead: _VERSION,
    RotationRead: {**_VERSION, "operation": "id"},
    OperationRead: {"tenant": "tenant", "operation": "id"},
    ApiKeyRead: {"tenant": "tenant", "key": "id"},
    ApiKeySecret: {"tenant": "tenant", "key": "id"},
    WebhookRead: {"tenant": "tenant", "webhook": "id"},
    WebhookSecret: {"tenant": "tenant", "webhook": "id"},
    DeliveryRead: {"tenant": "tenant", "webhook": "webhook"},
}


def complete(document: Document, routers: Iterable[APIRouter]) -> None:
    """Complete FastAPI's document of an application that includes ``routers``, in place."""
    routes = {route.name: route for router in routers for route in _routes(router)}
    components = document.setdefault("components", {})
    components["securitySchemes"] = _SCHEMES
    components["responses"] = {error.__name__: _response(status) for status, error in statuses.STATUS.items()}
    schema = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    components["schemas"] |= {**schema.pop("$defs"), "Problem": schema}
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    for operation in operations:
        _complete(operation, routes[operation["operationId"]])
    for operation in operations:
        _link(operation, routes)


def callers(route: APIRoute) -> list[str] | None:
    """Roles that may call a route, ``grant`` among them; ``None`` where no credential is needed."""
    admitting = [call for call in _calls(route.dependant) if isinstance(call, Allow)]
    if not admitting:
        return None
    allow = admitting[0]
    return [*(role.value for role in Role if role in allow.roles), *([GRANT] if allow.grant else [])]


def _routes(router: APIRouter) -> Iterator[APIRoute]:
    return (route for route in router.routes if isinstance(route, APIRoute))


def _calls(dependant: Dependant) -> Iterator[Any]:
    for one in dependant.dependencies:
        yield one.call
        yield from _calls(one)


def _response(status: int) -> Document:
    """The error answer of a status."""
    meaning = (statuses.STATUS[status].__doc__ or "").partition(": ")[2].partition("\n")[0]
    return {
        "description": f"{meaning[:1].upper()}{meaning[1:]}".replace("``retry_after``", "Retry-After"),
        "headers": {**_ERROR_HEADERS.get(status, {}), "Cache-Control": _NO_STORE},
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }


def _complete(operation: Document, route: APIRoute) -> None:
    who = callers(route)
    if who is not None:
        operation[ROLES] = who
    operation["security"] = _security(who)
    # Every change reads If-Match, but only key versions and models have an ETag.
    compared = "version" in _path(route) or _changes_a_model(route)
    parameters = [
        parameter
        for parameter in operation.pop("parameters", [])
        if parameter["name"] != "if-match" or compared
    ]
    if parameters:
        operation["parameters"] = [one | _PARAMETERS[one["name"]] for one in parameters]
    own = {status: answer for status, answer in operation["responses"].items() if status.startswith("2")}
    for answer in own.values():
        tagged = {"ETag": _ETAG} if route.response_model in {KeyVersionRead, ModelRead} else {}
        answer["headers"] = {**tagged, "Cache-Control": _NO_STORE}
    named = [status for status in route.responses if isinstance(status, int)]
    failures = sorted({*_failures(operation, who), *named})
    operation["responses"] = own | {
        str(status): {"$ref": f"#/components/responses/{statuses.STATUS[status].__name__}"}
        for status in failures
    }


def _changes_a_model(route: APIRoute) -> bool:
    return route.response_model is ModelRead and "PATCH" in (route.methods or ())


def _security(who: list[str] | None) -> list[Document]:
    if who is None:
        return []
    keys: list[Document] = [{"apiKey": []}, {"jwt": []}] if set(who) - {GRANT} else []
    return keys + ([{"grant": []}] if GRANT in who else [])


def _failures(operation: Document, who: list[str] | None) -> Iterator[int]:
    """Statuses of the errors that an operation can answer, from what it takes."""
    names = {parameter["name"] for parameter in operation.get("parameters", [])}
    yield 401
    yield 503
    if who is not None:
        yield from (403, 429)
    if names or "requestBody" in operation:
        yield 422
    if names & {"page", "idempotency-key"}:
        yield 400
    if names & {"tenant", "model", "version"}:
        yield 404
    if "idempotency-key" in names:
        yield from (409, 413)
    if "if-match" in names:
        yield 412


def _link(operation: Document, routes: Mapping[str, APIRoute]) -> None:
    """Say which calls take what an operation answers in their paths."""
    route = routes[operation["operationId"]]
    known = _FOLLOWED.get(route.response_model)
    if known is None:
        return
    newest = {list(known)[-1], "version"} & set(known)
    for status, answer in operation["responses"].items():
        if status.startswith("2"):
            answer["links"] = {
                other.name: {
                    "operationId": other.name,
                    "parameters": {name: f"$response.body#/{known[name]}" for name in _path(other)},
                }
                for other in routes.values()
                if other.include_in_schema and set(_path(other)) <= set(known) and newest & set(_path(other))
            }


def _path(route: APIRoute) -> list[str]:
    return re.findall(r"{(\w+)", route.path)
