"""The asynchronous twin of ``wire.keyservice``; import it from there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
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
from anamorph.wire.sealed import Purpose, Recipient
from anamorph.wire.states import State

T = TypeVar("T", bound=BaseModel)
Item = TypeVar("Item")


async def aeverything(fetch: Callable[..., Awaitable[Page[Item]]], *args: str) -> AsyncIterator[Item]:
    """Asynchronous twin of ``everything``."""
    page: str | None = None
    while True:
        answer = await fetch(*args, page=page)
        for item in answer.items:
            yield item
        page = answer.next_page
        if page is None:
            return


class AsyncKeyService:
    """Asynchronous twin of :class:`anamorph.wire.keyservice.KeyService`, which documents each method."""

    def __init__(
        self,
        url: str,
        token: Credential | None = None,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        timeout: httpx.Timeout = calls.TIMEOUT,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._http = httpx.AsyncClient(
            **calls.client_options(url, token), transport=transport, timeout=timeout
        )
        self._sleep = sleep

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _send(self, call: Call[T]) -> T:
        attempt = 0
        while True:
            response, failure = None, None
            try:
                response = await self._http.send(call.request(self._http))
            except httpx.TransportError as error:
                failure = error
            pause = call.pause(attempt, response)
            if pause is None:
                return call.finish(response, failure)
            await self._sleep(pause)
            attempt += 1

    async def create_tenant(self, tenant: TenantCreate) -> TenantRead:
        return await self._send(calls.post("/v1/tenants", TenantRead, tenant))

    async def list_tenants(self, *, page: str | None = None) -> Page[TenantRead]:
        return await self._send(calls.get("/v1/tenants", Page[TenantRead], page=page))

    async def get_tenant(self, tenant: str) -> TenantRead:
        return await self._send(calls.get(tenant_path(tenant), TenantRead))

    async def create_api_key(self, tenant: str, key: ApiKeyCreate) -> ApiKeySecret:
        return await self._send(calls.post_plain(f"{tenant_path(tenant)}/api-keys", ApiKeySecret, key))

    async def list_api_keys(self, tenant: str, *, page: str | None = None) -> Page[ApiKeyRead]:
        return await self._send(calls.get(f"{tenant_path(tenant)}/api-keys", Page[ApiKeyRead], page=page))

    async def revoke_api_key(self, tenant: str, key_id: str) -> ApiKeyRead:
        return await self._send(
            Call("DELETE", f"{tenant_path(tenant)}/api-keys/{key_id}", ApiKeyRead, repeatable=True)
        )

    async def create_model(self, tenant: str, model: ModelCreate) -> ModelRead:
        return await self._send(calls.post(f"{tenant_path(tenant)}/models", ModelRead, model))

    async def list_models(self, tenant: str, *, page: str | None = None) -> Page[ModelRead]:
        return await self._send(calls.get(f"{tenant_path(tenant)}/models", Page[ModelRead], page=page))

    async def get_model(self, tenant: str, model: str) -> ModelRead:
        return await self._send(calls.get(model_path(tenant, model), ModelRead))

    async def update_model(
        self, tenant: str, model: str, patch: ModelPatch, *, if_match: int | None = None
    ) -> ModelRead:
        return await self._send(calls.update_model(tenant, model, patch, if_match))

    async def get_policy(self, tenant: str, model: str) -> RotationPolicy:
        return await self._send(calls.get(f"{model_path(tenant, model)}/rotation-policy", RotationPolicy))

    async def update_policy(self, tenant: str, model: str, patch: RotationPolicyPatch) -> RotationPolicy:
        return await self._send(
            Call(
                "PATCH",
                f"{model_path(tenant, model)}/rotation-policy",
                RotationPolicy,
                patch,
                repeatable=True,
            )
        )

    async def rotate(self, tenant: str, model: str, *, idempotency_key: str | None = None) -> RotationRead:
        return await self._send(
            calls.post(f"{model_path(tenant, model)}/keys:rotate", RotationRead, key=idempotency_key)
        )

    async def list_versions(
        self, tenant: str, model: str, *, page: str | None = None
    ) -> Page[KeyVersionRead]:
        return await self._send(
            calls.get(f"{model_path(tenant, model)}/keys", Page[KeyVersionRead], page=page)
        )

    async def get_version(self, tenant: str, model: str, version: int) -> KeyVersionRead:
        return await self._send(calls.get(version_path(tenant, model, version), KeyVersionRead))

    async def suspend(
        self, tenant: str, model: str, version: int, *, if_match: int | None = None
    ) -> KeyVersionRead:
        return await self._send(calls.transition(tenant, model, version, "suspend", if_match))

    async def resume(
        self, tenant: str, model: str, version: int, *, if_match: int | None = None
    ) -> KeyVersionRead:
        return await self._send(calls.transition(tenant, model, version, "resume", if_match))

    async def revoke(
        self, tenant: str, model: str, version: int, *, if_match: int | None = None
    ) -> KeyVersionRead:
        return await self._send(calls.transition(tenant, model, version, "revoke", if_match))

    async def destroy(
        self, tenant: str, model: str, version: int, *, if_match: int | None = None
    ) -> KeyVersionRead:
        return await self._send(calls.transition(tenant, model, version, "destroy", if_match))

    async def restore(
        self, tenant: str, model: str, version: int, *, if_match: int | None = None
    ) -> KeyVersionRead:
        return await self._send(calls.transition(tenant, model, version, "restore", if_match))

    async def retire(
        self, tenant: str, model: str, version: int, *, if_match: int | None = None
    ) -> KeyVersionRead:
        return await self._send(calls.transition(tenant, model, version, "retire", if_match))

    async def destroyed(
        self, tenant: str, model: str, version: int, *, if_match: int | None = None
    ) -> KeyVersionRead:
        return await self._send(calls.transition(tenant, model, version, "destroyed", if_match))

    async def materialize(
        self, tenant: str, model: str, version: int, *, parts: int | None = None, part: int | None = None
    ) -> GrantRead:
        return await self._send(calls.materialize(tenant, model, version, parts, part))

    async def release(
        self, tenant: str, model: str, version: int, purpose: Purpose, *, part: int | None = None
    ) -> ReleaseRead:
        recipient = Recipient.generate(tenant, model, version, purpose)
        return recipient.open(await self._send(calls.release(recipient, part)))

    async def progress(self, tenant: str, model: str, version: int, progress: Progress) -> OperationRead:
        return await self._send(
            calls.on_version(tenant, model, version, "progress", OperationRead, progress, repeatable=True)
        )

    async def stage(
        self, tenant: str, model: str, version: int, materialized: Materialized
    ) -> KeyVersionRead:
        return await self._send(
            calls.on_version(tenant, model, version, "stage", KeyVersionRead, materialized, repeatable=True)
        )

    async def fail(self, tenant: str, model: str, version: int, failure: Failure) -> KeyVersionRead:
        return await self._send(
            calls.on_version(tenant, model, version, "fail", KeyVersionRead, failure, repeatable=True)
        )

    async def activate(
        self, tenant: str, model: str, version: int, activation: Activation, *, if_match: int | None = None
    ) -> KeyVersionRead:
        return await self._send(
            calls.post(
                version_path(tenant, model, version, "activate"),
                KeyVersionRead,
                activation,
                if_match=if_match,
            )
        )

    async def readdress(self, tenant: str, model: str, version: int, address: Address) -> KeyVersionRead:
        return await self._send(
            calls.on_version(tenant, model, version, "readdress", KeyVersionRead, address, repeatable=True)
        )

    async def report_usage(
        self, tenant: str, model: str, version: int, report: UsageReport
    ) -> KeyVersionRead:
        return await self._send(
            calls.on_version(tenant, model, version, "usage", KeyVersionRead, report, repeatable=True)
        )

    async def list_operations(self, tenant: str, *, page: str | None = None) -> Page[OperationRead]:
        return await self._send(
            calls.get(f"{tenant_path(tenant)}/operations", Page[OperationRead], page=page)
        )

    async def get_operation(self, tenant: str, operation: str) -> OperationRead:
        return await self._send(calls.get(f"{tenant_path(tenant)}/operations/{operation}", OperationRead))

    async def cancel_operation(self, tenant: str, operation: str) -> OperationRead:
        return await self._send(
            calls.post(f"{tenant_path(tenant)}/operations/{operation}:cancel", OperationRead)
        )

    async def inference_token(self, tenant: str, model: str) -> InferenceTokenRead:
        return await self._send(
            calls.post_plain(
                f"{model_path(tenant, model)}/inference-tokens", InferenceTokenRead, repeatable=True
            )
        )

    async def rotate_inference_keys(self) -> JwkSet:
        return await self._send(calls.post_plain("/v1/inference-keys:rotate", JwkSet))

    async def record_backup(self, body: BackupCreate) -> BackupRead:
        return await self._send(calls.post("/v1/backups", BackupRead, body))

    async def inference_keys(self) -> JwkSet:
        return await self._send(calls.get("/v1/inference-keys", JwkSet))

    async def audit(self, tenant: str, *, page: str | None = None) -> Page[AuditRead]:
        return await self._send(calls.get(f"{tenant_path(tenant)}/audit", Page[AuditRead], page=page))

    async def all_versions(
        self,
        *,
        states: Collection[State] = (),
        due: bool = False,
        page: str | None = None,
        limit: int | None = None,
    ) -> Page[KeyVersionRead]:
        return await self._send(calls.versions(states, page, limit, due=due))

    async def all_models(self, *, page: str | None = None, limit: int | None = None) -> Page[ModelRead]:
        return await self._send(calls.models(page, limit))

    async def create_webhook(self, tenant: str, webhook: WebhookCreate) -> WebhookSecret:
        return await self._send(calls.post_plain(f"{tenant_path(tenant)}/webhooks", WebhookSecret, webhook))

    async def list_webhooks(self, tenant: str, *, page: str | None = None) -> Page[WebhookRead]:
        return await self._send(calls.get(f"{tenant_path(tenant)}/webhooks", Page[WebhookRead], page=page))

    async def get_webhook(self, tenant: str, webhook: str) -> WebhookRead:
        return await self._send(calls.get(webhook_path(tenant, webhook), WebhookRead))

    async def delete_webhook(self, tenant: str, webhook: str) -> WebhookRead:
        return await self._send(calls.delete(webhook_path(tenant, webhook), WebhookRead))

    async def send_test_event(self, tenant: str, webhook: str) -> DeliveryRead:
        return await self._send(calls.post(f"{webhook_path(tenant, webhook)}:test", DeliveryRead))

    async def list_deliveries(
        self, tenant: str, webhook: str, *, page: str | None = None
    ) -> Page[DeliveryRead]:
        return await self._send(
            calls.get(f"{webhook_path(tenant, webhook)}/deliveries", Page[DeliveryRead], page=page)
        )

    async def get_quota(self, tenant: str) -> TenantQuota:
        return await self._send(calls.get(f"{tenant_path(tenant)}/quota", TenantQuota))

    async def update_quota(self, tenant: str, patch: TenantQuotaPatch) -> TenantQuota:
        return await self._send(
            Call("PATCH", f"{tenant_path(tenant)}/quota", TenantQuota, patch, repeatable=True)
        )
