"""Clients of the key service, sync and async: one method per route of its API.

    keys = KeyService("http://127.0.0.1:8400", api_key)
    operation = keys.rotate("acme", "chat")

Methods answer the messages of ``wire.admin`` and raise the subclass of
``errors.ServiceError`` that belongs to the answer's status. Lists come in pages:
``everything(keys.all_versions)`` runs through them all. A request is sent again,
after a connection error or a status of ``problems.RETRYABLE``, only where that
does no harm: reads, calls idempotent by nature, and changes under an
Idempotency-Key, which every method makes up for itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from types import TracebackType
from typing import Self, TypeVar

import httpx
from pydantic import BaseModel

from anamorph.wire import calls
from anamorph.wire.admin import (
    Activation,
    Address,
    ApiKeyCreate,
    ApiKeyRead,
    ApiKeySecret,
    AuditRead,
    BackupCreate,
    BackupRead,
    DeliveryRead,
    Failure,
    GrantRead,
    InferenceTokenRead,
    JwkSet,
    KeyVersionRead,
    Materialized,
    ModelCreate,
    ModelPatch,
    ModelRead,
    OperationRead,
    Page,
    Progress,
    ReleaseRead,
    RotationPolicy,
    RotationPolicyPatch,
    RotationRead,
    TenantCreate,
    TenantQuota,
    TenantQuotaPatch,
    TenantRead,
    UsageReport,
    WebhookCreate,
    WebhookRead,
    WebhookSecret,
)
from anamorph.wire.calls import Call, model_path, tenant_path, version_path, webhook_path
from anamorph.wire.credential import Credential
from anamorph.wire.keyservice_async import AsyncKeyService, aeverything
from anamorph.wire.sealed import Purpose, Recipient
from anamorph.wire.states import State

__all__ = ["AsyncKeyService", "KeyService", "aeverything", "everything"]

T = TypeVar("T", bound=BaseModel)
Item = TypeVar("Item")


def everything(fetch: Callable[..., Page[Item]], *args: str) -> Iterator[Item]:
    """Every item of a list, page by page: ``everything(keys.list_versions, "acme", "chat")``."""
    page: str | None = None
    while True:
        answer = fetch(*args, page=page)
        yield from answer.items
        page = answer.next_page
        if page is None:
            return


class KeyService:
    """The key service as seen with one credential.

    Args:
        url: base URL.
        token: API key, grant or service account's token; or a file that holds it, which is read anew
            for each request (so a projected token may be replaced), or a function that answers it;
            ``None`` for the calls that need none. A file that cannot be read is a ``SetupError``.
        transport: what carries the requests; the network by default.
        sleep: how to wait between attempts.
    """

    def __init__(
        self,
        url: str,
        token: Credential | None = None,
        *,
        transport: httpx.BaseTransport | None = None,
        timeout: httpx.Timeout = calls.TIMEOUT,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._http = httpx.Client(**calls.client_options(url, token), transport=transport, timeout=timeout)
        self._sleep = sleep

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, call: Call[T]) -> T:
        attempt = 0
        while True:
            response, failure = None, None
            try:
                response = self._http.send(call.request(self._http))
            except httpx.TransportError as error:
                failure = error
            pause = call.pause(attempt, response)
            if pause is None:
                return call.finish(response, failure)
            self._sleep(pause)
            attempt += 1

    def create_tenant(self, tenant: TenantCreate) -> TenantRead:
        """Create a tenant."""
        return self._send(calls.post("/v1/tenants", TenantRead, tenant))

    def list_tenants(self, *, page: str | None = None) -> Page[TenantRead]:
        """One page of all tenants."""
        return self._send(calls.get("/v1/tenants", Page[TenantRead], page=page))

    def get_tenant(self, tenant: str) -> TenantRead:
        """One tenant."""
        return self._send(calls.get(tenant_path(tenant), TenantRead))

    def create_api_key(self, tenant: str, key: ApiKeyCreate) -> ApiKeySecret:
        """Create an API key; this answer is the only one that shows it."""
        return self._send(calls.post_plain(f"{tenant_path(tenant)}/api-keys", ApiKeySecret, key))

    def list_api_keys(self, tenant: str, *, page: str | None = None) -> Page[ApiKeyRead]:
        """One page of a tenant's API keys, without the keys themselves."""
        return self._send(calls.get(f"{tenant_path(tenant)}/api-keys", Page[ApiKeyRead], page=page))

    def revoke_api_key(self, tenant: str, key_id: str) -> ApiKeyRead:
        """Revoke an API key; revoking it again changes nothing."""
        return self._send(
            Call("DELETE", f"{tenant_path(tenant)}/api-keys/{key_id}", ApiKeyRead, repeatable=True)
        )

    def create_model(self, tenant: str, model: ModelCreate) -> ModelRead:
        """Register a model."""
        return self._send(calls.post(f"{tenant_path(tenant)}/models", ModelRead, model))

    def list_models(self, tenant: str, *, page: str | None = None) -> Page[ModelRead]:
        """One page of a tenant's models."""
        return self._send(calls.get(f"{tenant_path(tenant)}/models", Page[ModelRead], page=page))

    def get_model(self, tenant: str, model: str) -> ModelRead:
        """One model."""
        return self._send(calls.get(model_path(tenant, model), ModelRead))

    def update_model(
        self, tenant: str, model: str, patch: ModelPatch, *, if_match: int | None = None
    ) -> ModelRead:
        """Change the fields of a model that ``patch`` sets; running versions stay as they are.

        Rotate for the change to take effect. ``if_match`` is the ``row_version`` that was read.
        """
        return self._send(calls.update_model(tenant, model, patch, if_match))

    def get_policy(self, tenant: str, model: str) -> RotationPolicy:
        """A model's rotation policy."""
        return self._send(calls.get(f"{model_path(tenant, model)}/rotation-policy", RotationPolicy))

    def update_policy(self, tenant: str, model: str, patch: RotationPolicyPatch) -> RotationPolicy:
        """Change the fields of the policy that ``patch`` sets; answers the whole policy."""
        return self._send(
            Call(
                "PATCH",
                f"{model_path(tenant, model)}/rotation-policy",
                RotationPolicy,
                patch,
                repeatable=True,
            )
        )

    def rotate(self, tenant: str, model: str, *, idempotency_key: str | None = None) -> RotationRead:
        """Begin a rotation: a new version in PENDING. Conflict while another one is in flight."""
        return self._send(
            calls.post(f"{model_path(tenant, model)}/keys:rotate", RotationRead, key=idempotency_key)
        )

    def list_versions(self, tenant: str, model: str, *, page: str | None = None) -> Page[KeyVersionRead]:
        """One page of a model's key versions, oldest first."""
        return self._send(calls.get(f"{model_path(tenant, model)}/keys", Page[KeyVersionRead], page=page))

    def get_version(self, tenant: str, model: str, version: int) -> KeyVersionRead:
        """One key version."""
        return self._send(calls.get(version_path(tenant, model, version), KeyVersionRead))

    def suspend(
        self, tenant: str, model: str, version: int, *, if_match: int | None = None
    ) -> KeyVersionRead:
        """ACTIVE or DRAINING to SUSPENDED."""
        return self._send(calls.transition(tenant, model, version, "suspend", if_match))

    def resume(self, tenant: str, model: str, version: int, *, if_match: int | None = None) -> KeyVersionRead:
        """SUSPENDED back to the state before. Conflict when another version is ACTIVE by then."""
        return self._send(calls.transition(tenant, model, version, "resume", if_match))

    def revoke(self, tenant: str, model: str, version: int, *, if_match: int | None = None) -> KeyVersionRead:
        """Anything living to COMPROMISED."""
        return self._send(calls.transition(tenant, model, version, "revoke", if_match))

    def destroy(
        self, tenant: str, model: str, version: int, *, if_match: int | None = None
    ) -> KeyVersionRead:
        """RETIRED, FAILED or COMPROMISED to DESTROY_SCHEDULED."""
        return self._send(calls.transition(tenant, model, version, "destroy", if_match))

    def restore(
        self, tenant: str, model: str, version: int, *, if_match: int | None = None
    ) -> KeyVersionRead:
        """DESTROY_SCHEDULED back to RETIRED; never what was compromised."""
        return self._send(calls.transition(tenant, model, version, "restore", if_match))

    def retire(self, tenant: str, model: str, version: int, *, if_match: int | None = None) -> KeyVersionRead:
        """DRAINING to RETIRED. Conflict before ``drain_until``."""
        return self._send(calls.transition(tenant, model, version, "retire", if_match))

    def destroyed(
        self, tenant: str, model: str, version: int, *, if_match: int | None = None
    ) -> KeyVersionRead:
        """DESTROY_SCHEDULED to DESTROYED; erases the root's ciphertext. Conflict before ``destroy_at``."""
        return self._send(calls.transition(tenant, model, version, "destroyed", if_match))

    def materialize(
        self, tenant: str, model: str, version: int, *, parts: int | None = None, part: int | None = None
    ) -> GrantRead:
        """Issue a materialisation grant; every older grant of this version is void from then on.

        With ``part``, 0 to ``parts`` - 1, it is that part's, and only that part's older grant is void.
        """
        return self._send(calls.materialize(tenant, model, version, parts, part))

    def release(
        self, tenant: str, model: str, version: int, purpose: Purpose, *, part: int | None = None
    ) -> ReleaseRead:
        """Key material: the vocab subkey for ``client``, the root, once, for ``materialize``.

        It crosses the network sealed to a key of this one call. ``part`` is that of a part's grant.

        Raises:
            InvalidKey: the answer is not sealed.
            KeyMismatch: the answer is about another key, or does not open.
        """
        recipient = Recipient.generate(tenant, model, version, purpose)
        return recipient.open(self._send(calls.release(recipient, part)))

    def progress(self, tenant: str, model: str, version: int, progress: Progress) -> OperationRead:
        """Report how far the materialisation is; with the grant."""
        return self._send(
            calls.on_version(tenant, model, version, "progress", OperationRead, progress, repeatable=True)
        )

    def stage(self, tenant: str, model: str, version: int, materialized: Materialized) -> KeyVersionRead:
        """MATERIALIZING to STAGED; with the grant. The same report again changes nothing."""
        return self._send(
            calls.on_version(tenant, model, version, "stage", KeyVersionRead, materialized, repeatable=True)
        )

    def fail(self, tenant: str, model: str, version: int, failure: Failure) -> KeyVersionRead:
        """PENDING, MATERIALIZING or STAGED to FAILED; with the grant, or as platform."""
        return self._send(
            calls.on_version(tenant, model, version, "fail", KeyVersionRead, failure, repeatable=True)
        )

    def activate(
        self, tenant: str, model: str, version: int, activation: Activation, *, if_match: int | None = None
    ) -> KeyVersionRead:
        """STAGED to ACTIVE, and the previous ACTIVE version to DRAINING with it."""
        return self._send(
            calls.post(
                version_path(tenant, model, version, "activate"),
                KeyVersionRead,
                activation,
                if_match=if_match,
            )
        )

    def readdress(self, tenant: str, model: str, version: int, address: Address) -> KeyVersionRead:
        """Say where clients reach a version that is ACTIVE, DRAINING or SUSPENDED; its state stays."""
        return self._send(
            calls.on_version(tenant, model, version, "readdress", KeyVersionRead, address, repeatable=True)
        )

    def report_usage(self, tenant: str, model: str, version: int, report: UsageReport) -> KeyVersionRead:
        """Report served tokens; per source the highest count stands."""
        return self._send(
            calls.on_version(tenant, model, version, "usage", KeyVersionRead, report, repeatable=True)
        )

    def list_operations(self, tenant: str, *, page: str | None = None) -> Page[OperationRead]:
        """One page of a tenant's operations, oldest first."""
        return self._send(calls.get(f"{tenant_path(tenant)}/operations", Page[OperationRead], page=page))

    def get_operation(self, tenant: str, operation: str) -> OperationRead:
        """One operation."""
        return self._send(calls.get(f"{tenant_path(tenant)}/operations/{operation}", OperationRead))

    def cancel_operation(self, tenant: str, operation: str) -> OperationRead:
        """Cancel a rotation that is not active yet: its version becomes FAILED."""
        return self._send(calls.post(f"{tenant_path(tenant)}/operations/{operation}:cancel", OperationRead))

    def inference_token(self, tenant: str, model: str) -> InferenceTokenRead:
        """A short-lived token for the inference endpoint, worthless to the key service."""
        return self._send(
            calls.post_plain(
                f"{model_path(tenant, model)}/inference-tokens", InferenceTokenRead, repeatable=True
            )
        )

    def rotate_inference_keys(self) -> JwkSet:
        """Publish the next signing key of inference tokens; all keys published then."""
        return self._send(calls.post_plain("/v1/inference-keys:rotate", JwkSet))

    def record_backup(self, body: BackupCreate) -> BackupRead:
        """Note that a backup of the database was taken, and can be restored."""
        return self._send(calls.post("/v1/backups", BackupRead, body))

    def inference_keys(self) -> JwkSet:
        """Public keys that inference tokens are verified with; needs no credential."""
        return self._send(calls.get("/v1/inference-keys", JwkSet))

    def audit(self, tenant: str, *, page: str | None = None) -> Page[AuditRead]:
        """One page of the tenant's audit log, oldest first."""
        return self._send(calls.get(f"{tenant_path(tenant)}/audit", Page[AuditRead], page=page))

    def all_versions(
        self,
        *,
        states: Collection[State] = (),
        due: bool = False,
        page: str | None = None,
        limit: int | None = None,
    ) -> Page[KeyVersionRead]:
        """One page of the key versions of all tenants.

        Args:
            states: only versions in one of these; all by default.
            due: only versions that are to be destroyed by now.
            page: ``next_page`` of the page before.
            limit: most items of the page, up to 500; the service's default is 100.
        """
        return self._send(calls.versions(states, page, limit, due=due))

    def all_models(self, *, page: str | None = None, limit: int | None = None) -> Page[ModelRead]:
        """One page of the models of all tenants."""
        return self._send(calls.models(page, limit))

    def create_webhook(self, tenant: str, webhook: WebhookCreate) -> WebhookSecret:
        """Create a webhook; this answer is the only one that shows its secret."""
        return self._send(calls.post_plain(f"{tenant_path(tenant)}/webhooks", WebhookSecret, webhook))

    def list_webhooks(self, tenant: str, *, page: str | None = None) -> Page[WebhookRead]:
        """One page of a tenant's webhooks, without their secrets."""
        return self._send(calls.get(f"{tenant_path(tenant)}/webhooks", Page[WebhookRead], page=page))

    def get_webhook(self, tenant: str, webhook: str) -> WebhookRead:
        """One webhook."""
        return self._send(calls.get(webhook_path(tenant, webhook), WebhookRead))

    def delete_webhook(self, tenant: str, webhook: str) -> WebhookRead:
        """Delete a webhook, with all that was to be sent to it."""
        return self._send(calls.delete(webhook_path(tenant, webhook), WebhookRead))

    def send_test_event(self, tenant: str, webhook: str) -> DeliveryRead:
        """Send an event of the type ``webhook.test``, once."""
        return self._send(calls.post(f"{webhook_path(tenant, webhook)}:test", DeliveryRead))

    def list_deliveries(self, tenant: str, webhook: str, *, page: str | None = None) -> Page[DeliveryRead]:
        """One page of what was and is to be sent to a webhook, oldest first."""
        return self._send(
            calls.get(f"{webhook_path(tenant, webhook)}/deliveries", Page[DeliveryRead], page=page)
        )

    def get_quota(self, tenant: str) -> TenantQuota:
        """How many objects a tenant may have."""
        return self._send(calls.get(f"{tenant_path(tenant)}/quota", TenantQuota))

    def update_quota(self, tenant: str, patch: TenantQuotaPatch) -> TenantQuota:
        """Change the fields of the quota that ``patch`` sets; answers the whole quota."""
        return self._send(Call("PATCH", f"{tenant_path(tenant)}/quota", TenantQuota, patch, repeatable=True))
