"""The tenants of one machine's system: created once, found again by every later ``up``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from anamorph.cli.machine.home import MODEL, Home, write_private
from anamorph.client.tokenizer import chat_template_digest, tokenizer_digest
from anamorph.errors import Conflict, MaterializationError, NotFound, SetupError
from anamorph.wire.admin import (
    ApiKeyCreate,
    Dtype,
    Engine,
    KeyVersionRead,
    ModelCreate,
    OperationRead,
    OperationStatus,
    Role,
    RotationPolicy,
    TenantCreate,
)
from anamorph.wire.keyservice import KeyService, everything
from anamorph.wire.states import State

ROLES = (Role.ADMIN, Role.CLIENT)
_COMING = frozenset({State.PENDING, State.MATERIALIZING, State.STAGED, State.ACTIVE})


@dataclass(frozen=True)
class ServedModel:
    """What each tenant registers: one base checkpoint with its tokenizer in the same folder."""

    folder: Path
    dtype: Dtype = "float32"
    engine: Engine = "torch"
    policy: RotationPolicy = field(default_factory=RotationPolicy)

    def record(self) -> ModelCreate:
        """The model record for the key service; sizes from ``config.json``, digests from the tokenizer.

        Raises:
            SetupError: the folder holds no model with a tokenizer.
        """
        try:
            config = json.loads((self.folder / "config.json").read_text())
        except OSError:
            raise SetupError(f"{self.folder} holds no config.json: name a Hugging Face folder") from None
        return ModelCreate(
            id=MODEL,
            base=str(self.folder),
            engine=self.engine,
            dtype=self.dtype,
            vocab_size=config["vocab_size"],
            context_length=config["max_position_embeddings"],
            tokenizer_digest=tokenizer_digest(self.folder),
            chat_template_digest=chat_template_digest(self.folder),
            policy=self.policy,
        )


def keys_as(home: Home, url: str, tenant: str, role: Role) -> KeyService:
    """The key service as one of a tenant's roles sees it."""
    return KeyService(url, home.api_key(tenant, role).read_text().strip())


def platform_keys(home: Home, url: str) -> KeyService:
    """The key service as the platform sees it."""
    return KeyService(url, home.platform_key.read_text().strip())


def ensure_tenant(home: Home, url: str, tenant: str, model: ServedModel) -> None:
    """Make sure that the tenant, its API keys, its model and a key version exist."""
    with platform_keys(home, url) as platform:
        try:
            platform.create_tenant(TenantCreate(id=tenant))
        except Conflict:
            platform.get_tenant(tenant)
        for role in ROLES:
            if not home.api_key(tenant, role).exists():
                made = platform.create_api_key(tenant, ApiKeyCreate(name=f"local {role}", role=role))
                write_private(home.api_key(tenant, role), made.secret)
    with keys_as(home, url, tenant, Role.ADMIN) as admin:
        try:
            admin.get_model(tenant, MODEL)
        except NotFound:
            admin.create_model(tenant, model.record())
        if not any(version.state in _COMING for version in everything(admin.list_versions, tenant, MODEL)):
            admin.rotate(tenant, MODEL)


def active_version(keys: KeyService, tenant: str) -> KeyVersionRead | None:
    """The version that the tenant's clients use."""
    versions = everything(keys.list_versions, tenant, MODEL)
    return next((version for version in versions if version.state is State.ACTIVE), None)


Report = Callable[[Mapping[str, OperationRead]], None]


def await_active(home: Home, url: str, tenants: tuple[str, ...], report: Report, timeout_s: float) -> None:
    """Wait until every tenant has an ACTIVE version, reporting the operations on the way.

    Raises:
        MaterializationError: a first version failed.
        SetupError: it took too long.
    """
    deadline = time.monotonic() + timeout_s
    with platform_keys(home, url) as keys:
        waiting = set(tenants)
        while waiting:
            operations = {tenant: latest_operation(keys, tenant) for tenant in tenants}
            report({tenant: one for tenant, one in operations.items() if one is not None})
            waiting = {tenant for tenant in waiting if active_version(keys, tenant) is None}
            for tenant in sorted(waiting):
                _check(tenant, operations[tenant])
            if waiting and time.monotonic() > deadline:
                raise SetupError(
                    f"{', '.join(sorted(waiting))} took too long; see {home.logs / 'operator.log'}"
                )
            time.sleep(0.3 if waiting else 0)


def latest_operation(keys: KeyService, tenant: str) -> OperationRead | None:
    """The tenant's newest rotation."""
    rotations = [one for one in everything(keys.list_operations, tenant) if one.kind == "rotate"]
    return rotations[-1] if rotations else None


def _check(tenant: str, operation: OperationRead | None) -> None:
    if operation is not None and operation.status is OperationStatus.FAILED:
        raise MaterializationError(f"{tenant}'s replica was not made: {operation.error}")
