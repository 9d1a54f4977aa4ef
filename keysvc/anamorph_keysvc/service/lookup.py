"""Finding rows, and turning them into the messages that callers read."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, bindparam
from sqlmodel import Session, col, select

from anamorph.wire.admin import (
    ApiKeyRead,
    KeyVersionRead,
    Materialized,
    ModelRead,
    OperationRead,
    RotationPolicy,
    TenantRead,
)
from anamorph.wire.states import State
from anamorph_keysvc.service.work import found
from anamorph_keysvc.tables import ApiKey, KeyVersion, Model, Operation, Tenant


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


def version_and_model(session: Session, tenant: str, model: str, version: int) -> tuple[KeyVersion, Model]:
    """A key version, locked as a model is, and its model, which is not; or NotFound."""
    wanted = select(KeyVersion, Model).where(
        KeyVersion.tenant == tenant,
        KeyVersion.model == model,
        KeyVersion.version == version,
        Model.tenant == KeyVersion.tenant,
        Model.id == KeyVersion.model,
    )
    locked = wanted.with_for_update(of=KeyVersion) if _locks(session) else wanted
    return found(session.exec(locked).one_or_none(), "key version")


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


def has_state(*states: State) -> ColumnElement[bool]:
    """Whether a version is in one of ``states``, of which there must be one.

    They are written into the statement as they are: only so do the databases see that a partial
    index covers it. SQLite compares word by word, hence their order, and the equality.
    """
    column: Any = col(KeyVersion.state)
    ordered = [state for state in State if state in states]
    one = len(ordered) == 1
    wanted = bindparam(
        None, ordered[0] if one else ordered, column.type, expanding=not one, literal_execute=True
    )
    found: ColumnElement[bool] = column == wanted if one else column.in_(wanted)
    return found


def tenant_read(row: Tenant) -> TenantRead:
    """Message of a tenant."""
    return TenantRead.model_validate(row.model_dump(include=set(TenantRead.model_fields)))


def model_read(row: Model) -> ModelRead:
    """Message of a model."""
    return ModelRead.model_validate(row.model_dump())


def policy_of(row: Model) -> RotationPolicy:
    """A model's rotation policy."""
    return RotationPolicy.model_validate(row.policy)


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
