"""Finding rows, and turning them into the messages that callers read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlmodel import Session, col, select

from anamorph.wire.admin import (
    ApiKeyRead,
    KeyVersionRead,
    Materialized,
    ModelRead,
    ModelSettings,
    OperationRead,
    RotationPolicy,
    TenantRead,
)
from anamorph.wire.states import State
from anamorph_keysvc.prepared import PreparedSelect
from anamorph_keysvc.service.work import found
from anamorph_keysvc.tables import TABLES, ApiKey, KeyVersion, Model, Operation, Tenant


def tenant(session: Session, tenant: str) -> Tenant:
    """A tenant, or NotFound."""
    return found(session.get(Tenant, tenant), "tenant")


def model(session: Session, tenant: str, model: str, *, lock: bool = True) -> Model:
    """A model, or NotFound; in a write transaction locked until it ends, where the database can.

    Whoever changes a model's ACTIVE version holds the model first: without ``lock`` for
    those who hold a version already and only read.
    """
    locks = _locks(session) if lock else None
    return found(session.get(Model, (tenant, model), with_for_update=locks), "model")


def version(session: Session, tenant: str, model: str, version: int) -> KeyVersion:
    """A key version, or NotFound; locked as a model is."""
    return found(
        session.get(KeyVersion, (tenant, model, version), with_for_update=_locks(session)), "key version"
    )


@dataclass(frozen=True)
class Releasable:
    """What a release needs of a key version and its model; fields as of ``KeyVersion`` and ``Model``."""

    tenant: str
    model: str
    version: int
    state: State
    key_id: str | None
    kcv: str | None
    vocab_kcv: str | None
    ciphertext: bytes | None = field(repr=False)
    vocab_size: int
    policy: dict[str, Any]


_VERSION, _MODEL = TABLES["key_version"].c, TABLES["model"].c
_RELEASABLE = PreparedSelect(
    sa.select(
        *(_VERSION.tenant, _VERSION.model, _VERSION.version, _VERSION.state),
        *(_VERSION.key_id, _VERSION.kcv, _VERSION.vocab_kcv, _VERSION.ciphertext),
        *(_MODEL.vocab_size, _MODEL.policy),
    )
    .where(
        _VERSION.tenant == sa.bindparam("tenant"),
        _VERSION.model == sa.bindparam("model"),
        _VERSION.version == sa.bindparam("version"),
        _MODEL.tenant == _VERSION.tenant,
        _MODEL.id == _VERSION.model,
    )
    .with_for_update(of=TABLES["key_version"])
)


def releasable(session: Session, tenant: str, model: str, version: int) -> Releasable:
    """A key version to be released in this write transaction, locked as a model is; or NotFound."""
    row = _RELEASABLE.run(session, tenant=tenant, model=model, version=version).one_or_none()
    return Releasable(*found(row, "key version"))


def _locks(session: Session) -> bool | None:
    return True if session.info.get("locks") else None


def operation(session: Session, tenant: str, id_: str, *, lock: bool = True) -> Operation:
    """An operation of this tenant, or NotFound; locked as a model is."""
    row = session.get(Operation, id_, with_for_update=_locks(session) if lock else None)
    return found(row if row is not None and row.tenant == tenant else None, "operation")


def operation_of(session: Session, version: KeyVersion) -> Operation:
    """The rotation that made a version."""
    return session.exec(
        select(Operation).where(
            Operation.kind == "rotate",
            Operation.tenant == version.tenant,
            Operation.model == version.model,
            Operation.version == version.version,
        )
    ).one()


def in_states(session: Session, model: Model, *states: State) -> KeyVersion | None:
    """The one version of a model in any of ``states``, of which the database admits one; locked."""
    wanted = select(KeyVersion).where(
        KeyVersion.tenant == model.tenant,
        KeyVersion.model == model.id,
        col(KeyVersion.state).in_(states),
    )
    return session.exec(wanted.with_for_update() if _locks(session) else wanted).one_or_none()


def has_state(*states: State) -> sa.ColumnElement[bool]:
    """Whether a version is in one of ``states``, of which there must be one.

    They are written into the statement as they are: only so do the databases see that a partial
    index covers it. SQLite compares word by word, hence their order, and the equality.
    """
    column: Any = col(KeyVersion.state)
    ordered = [state for state in State if state in states]
    one = len(ordered) == 1
    wanted = sa.bindparam(
        None, ordered[0] if one else ordered, column.type, expanding=not one, literal_execute=True
    )
    found: sa.ColumnElement[bool] = column == wanted if one else column.in_(wanted)
    return found


def tenant_read(row: Tenant) -> TenantRead:
    """Message of a tenant."""
    return TenantRead.model_validate(row.model_dump(include=set(TenantRead.model_fields)))


def model_read(row: Model) -> ModelRead:
    """Message of a model."""
    return ModelRead.model_validate(row.model_dump())


def policy_of(row: Model | Releasable) -> RotationPolicy:
    """A model's rotation policy."""
    return RotationPolicy.model_validate(row.policy)


def settings_of(row: Model) -> dict[str, Any]:
    """What of a model's record may change, as a version keeps it."""
    return row.model_dump(include=set(ModelSettings.model_fields))


_HIDDEN = {"ciphertext", "kek_version", "previous_state", "artifact", "rotate_at", "token_limit"}


def version_read(row: KeyVersion) -> KeyVersionRead:
    """Message of a key version. A deadline shows only while it is one."""
    fields = row.model_dump(exclude=_HIDDEN)
    if row.state not in {State.DESTROY_SCHEDULED, State.DESTROYED}:
        fields["destroy_at"] = None
    artifact = None if row.artifact is None else Materialized.model_validate(row.artifact)
    return KeyVersionRead(**fields, artifact=artifact)


def operation_read(row: Operation) -> OperationRead:
    """Message of an operation."""
    return OperationRead.model_validate(row.model_dump(include=set(OperationRead.model_fields)))


def api_key_read(row: ApiKey) -> ApiKeyRead:
    """Message of an API key, without the key."""
    return ApiKeyRead(**row.model_dump(exclude={"hash"}))
