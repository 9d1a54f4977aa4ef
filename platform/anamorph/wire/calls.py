"""The routes of the key service as values: method, path, body and the message that comes back.

The sync and the async client send the same ``Call``; everything that is decided
before or after the network stands here once.
"""

from __future__ import annotations

import ssl
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypedDict, TypeVar

import httpx
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from pydantic import BaseModel, ValidationError

from anamorph import errors
from anamorph.wire import admin, problems, trust
from anamorph.wire.credential import Credential, bearer
from anamorph.wire.sealed import Recipient
from anamorph.wire.states import State

T = TypeVar("T", bound=BaseModel)

ATTEMPTS = 4
TIMEOUT = httpx.Timeout(30.0, connect=3.0)
_LONGEST_PAUSE_S = 10.0
# What is not set in one of them stays as it is.
_PATCHES = (admin.ModelPatch, admin.RotationPolicyPatch, admin.TenantQuotaPatch)
# As ``telemetry.traces`` does it, which is not below this module.
_propagator = TraceContextTextMapPropagator()


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request to the key service.

    ``repeatable`` says that sending it twice does no harm: it reads, it is
    idempotent by nature, or it carries an Idempotency-Key.
    """

    method: str
    path: str
    answer: type[T]
    body: BaseModel | None = None
    query: Mapping[str, str | list[str]] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    repeatable: bool = False

    def request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        """The request as ``http`` would send it."""
        headers, content = {**self.headers, **_traceparent()}, None
        if self.body is not None:
            content = self.body.model_dump_json(exclude_unset=isinstance(self.body, _PATCHES))
            headers["Content-Type"] = "application/json"
        return http.build_request(
            self.method, self.path, content=content, params=self.query or None, headers=headers
        )

    def read(self, response: httpx.Response) -> T:
        """The answer's message.

        Raises:
            ServiceError: the subclass of the answer's status; the base class if it is no message.
        """
        problems.raise_for(response.status_code, _json(response), response.headers.get("Retry-After"))
        try:
            return self.answer.model_validate_json(response.content)
        except ValidationError as error:
            # Without the cause: pydantic quotes the input, which may be a secret.
            raise errors.ServiceError(
                f"the answer to {self.method} {self.path} is no {self.answer.__name__}: "
                f"{error.error_count()} field(s) are wrong; are client and service of one release?"
            ) from None

    def finish(self, response: httpx.Response | None, failure: httpx.TransportError | None) -> T:
        """The answer's message, or the last attempt's failure as an exception.

        Raises:
            ServiceError: as ``read`` does; ``Unavailable`` if nothing answered.
        """
        if response is None:
            what = type(failure).__name__
            raise errors.Unavailable(
                f"the key service does not answer ({what}): is it running?", code="no_answer"
            )
        return self.read(response)

    def pause(self, attempt: int, response: httpx.Response | None) -> float | None:
        """Seconds to wait before sending again, or ``None`` to give up.

        Args:
            attempt: 0 for the first.
            response: the answer, or ``None`` when the connection failed.
        """
        if not self.repeatable or attempt + 1 >= ATTEMPTS:
            return None
        if response is not None and not _worth_repeating(response):
            return None
        asked = response.headers.get("Retry-After", "") if response is not None else ""
        return min(float(asked) if asked.isdigit() else 0.2 * 2**attempt, _LONGEST_PAUSE_S)


class ClientOptions(TypedDict):
    """What both clients hand to httpx."""

    base_url: str
    auth: httpx.Auth | None
    verify: ssl.SSLContext
    follow_redirects: bool
    trust_env: bool


def client_options(url: str, token: Credential | None) -> ClientOptions:
    """Options of the httpx client: no environment, no redirects that carry the token away."""
    return ClientOptions(
        base_url=url,
        auth=bearer(token),
        verify=trust.context(),
        follow_redirects=False,
        trust_env=False,
    )


def _traceparent() -> dict[str, str]:
    """Of the caller's span, if there is one; never ``tracestate``, which is others' free text."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return {name: value for name, value in carrier.items() if name == "traceparent"}


def _worth_repeating(response: httpx.Response) -> bool:
    if response.status_code in problems.RETRYABLE:
        return True
    # Our own first attempt may still be running on the other side.
    body = _json(response) if response.status_code == 409 else None
    return isinstance(body, dict) and body.get("code") == "request_in_flight"


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def get(path: str, answer: type[T], *, page: str | None = None, **query: str | list[str] | None) -> Call[T]:
    """A read, of one page where the answer is a list."""
    wanted = {name: value for name, value in {**query, "page": page}.items() if value is not None}
    return Call("GET", path, answer, query=wanted, repeatable=True)


def post(
    path: str,
    answer: type[T],
    body: BaseModel | None = None,
    *,
    key: str | None = None,
    if_match: int | None = None,
) -> Call[T]:
    """A change under an Idempotency-Key, a fresh one by default, so that it can be repeated."""
    return Call("POST", path, answer, body, headers=_once(key, if_match), repeatable=True)


def _once(key: str | None, if_match: int | None) -> dict[str, str]:
    headers = {"Idempotency-Key": key or uuid.uuid4().hex}
    if if_match is not None:
        headers["If-Match"] = f'"{if_match}"'
    return headers


def delete(path: str, answer: type[T]) -> Call[T]:
    """A deletion under a fresh Idempotency-Key: repeated, it answers what was deleted, and not 404."""
    return Call("DELETE", path, answer, headers={"Idempotency-Key": uuid.uuid4().hex}, repeatable=True)


def post_plain(
    path: str, answer: type[T], body: BaseModel | None = None, *, repeatable: bool = False
) -> Call[T]:
    """A call that takes no Idempotency-Key: it answers a secret, or is idempotent by nature."""
    return Call("POST", path, answer, body, repeatable=repeatable)


def tenant_path(tenant: str) -> str:
    """Path of a tenant; ids follow ``wire.ids``, so nothing in them needs quoting."""
    return f"/v1/tenants/{tenant}"


def webhook_path(tenant: str, webhook: str) -> str:
    """Path of a webhook."""
    return f"{tenant_path(tenant)}/webhooks/{webhook}"


def model_path(tenant: str, model: str) -> str:
    """Path of a model."""
    return f"/v1/tenants/{tenant}/models/{model}"


def version_path(tenant: str, model: str, version: int, verb: str = "") -> str:
    """Path of a key version, or of one of its verbs."""
    return f"{model_path(tenant, model)}/keys/{version}" + (f":{verb}" if verb else "")


Verb = Literal["suspend", "resume", "revoke", "destroy", "restore", "retire", "destroyed"]


def transition(
    tenant: str, model: str, version: int, verb: Verb, if_match: int | None
) -> Call[admin.KeyVersionRead]:
    """A transition that takes no body."""
    return post(version_path(tenant, model, version, verb), admin.KeyVersionRead, if_match=if_match)


def on_version(
    tenant: str,
    model: str,
    version: int,
    verb: str,
    answer: type[T],
    body: BaseModel | None = None,
    *,
    repeatable: bool = False,
) -> Call[T]:
    """A call on one key version that takes no Idempotency-Key."""
    return post_plain(version_path(tenant, model, version, verb), answer, body, repeatable=repeatable)


def materialize(
    tenant: str, model: str, version: int, parts: int | None, part: int | None
) -> Call[admin.GrantRead]:
    """Ask for a grant; asked again, the older one is void."""
    body = None if parts is None and part is None else admin.GrantCreate(parts=parts, part=part)
    return on_version(tenant, model, version, "materialize", admin.GrantRead, body, repeatable=True)


def release(recipient: Recipient, part: int | None = None) -> Call[admin.ReleaseRead]:
    """Ask for key material, sealed to ``recipient``; a root is released once, so never asked for twice."""
    return on_version(
        recipient.tenant,
        recipient.model,
        recipient.version,
        "release",
        admin.ReleaseRead,
        admin.ReleaseRequest(purpose=recipient.purpose, recipient=recipient.public, part=part),
        repeatable=recipient.purpose == "client",
    )


def versions(
    states: Collection[State], page: str | None, limit: int | None, *, due: bool
) -> Call[admin.Page[admin.KeyVersionRead]]:
    """One page of the key versions of all tenants."""
    return get(
        "/v1/versions",
        admin.Page[admin.KeyVersionRead],
        page=page,
        state=[state for state in State if state in states] or None,
        due="true" if due else None,
        limit=_number(limit),
    )


def update_model(
    tenant: str, model: str, patch: admin.ModelPatch, if_match: int | None
) -> Call[admin.ModelRead]:
    """Change a model's record, under a fresh Idempotency-Key: an If-Match holds for one attempt only."""
    path, headers = model_path(tenant, model), _once(None, if_match)
    return Call("PATCH", path, admin.ModelRead, patch, headers=headers, repeatable=True)


def models(page: str | None, limit: int | None) -> Call[admin.Page[admin.ModelRead]]:
    """One page of the models of all tenants."""
    return get("/v1/models", admin.Page[admin.ModelRead], page=page, limit=_number(limit))


def _number(value: int | None) -> str | None:
    return None if value is None else str(value)
