"""Carries what a resource asks for out in the key service, a step at a time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from anamorph.wire.admin import Failure, ModelCreate, ModelPatch
from anamorph.wire.keyservice import AsyncKeyService
from anamorph_operator.kubernetes import intent


async def carry(keys: AsyncKeyService, step: intent.Step) -> None:
    """Do one step; each may be repeated.

    Raises:
        ServiceError: the key service refuses it, or does not answer.
    """
    doers: dict[type[Any], Callable[[Any], Awaitable[Any]]] = {
        intent.CreateModel: lambda s: keys.create_model(s.tenant, ModelCreate.model_validate(s.fields)),
        intent.PatchModel: lambda s: keys.update_model(
            s.tenant, s.model, ModelPatch.model_validate(s.changes)
        ),
        intent.PatchPolicy: lambda s: keys.update_policy(s.tenant, s.model, s.patch),
        intent.Rotate: lambda s: keys.rotate(s.tenant, s.model, idempotency_key=s.once),
        intent.Fail: lambda s: keys.fail(s.tenant, s.model, s.version, Failure(reason=s.reason)),
        intent.Revoke: lambda s: keys.revoke(s.tenant, s.model, s.version),
        intent.Destroy: lambda s: keys.destroy(s.tenant, s.model, s.version),
    }
    await doers[type(step)](step)
