"""On whose behalf a database session works, and what it may therefore see.

Every session has a scope. A tenant's session is narrowed here, on every database: each
statement gets the tenant's criterion, a statement that cannot be narrowed is refused,
and so is a row of another tenant. PostgreSQL enforces the same once more by row
security (migration 0003), as the role that the scope names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sqlalchemy import Column, ColumnClause, Connection, FromClause, Table, TextClause, event, inspect
from sqlalchemy.orm import ORMExecuteState, with_loader_criteria
from sqlalchemy.sql import visitors
from sqlmodel import Session

from anamorph_keysvc import tables
from anamorph_keysvc.columns import Base


@dataclass(frozen=True)
class Scope:
    """``role`` is PostgreSQL's; ``tenant`` is absent for what stands above tenants."""

    role: str
    tenant: str | None = None


PLATFORM = Scope("anamorph_platform")
WORKER = Scope("anamorph_worker")


def tenant_scope(tenant: str) -> Scope:
    """The scope of one tenant's callers."""
    return Scope("anamorph_api", tenant)


def scope_of(tenant: str | None) -> Scope:
    """A caller's scope: its tenant's, or the platform's for a caller above tenants."""
    return PLATFORM if tenant is None else tenant_scope(tenant)


class ScopedSession(Session):
    """A session that is held to its scope, ``info["scope"]``."""

    def __init__(self, connection: Connection, scope: Scope) -> None:
        super().__init__(connection, expire_on_commit=False, info={"scope": scope})


@event.listens_for(ScopedSession, "do_orm_execute")
def _narrow(state: ORMExecuteState) -> None:
    tenant = state.session.info["scope"].tenant
    if tenant is None:
        return
    mapped = _mapped(state)
    if mapped is None:
        raise RuntimeError("a tenant's session takes ORM statements only: this one cannot be narrowed")
    if not state.is_column_load:
        criteria = _criteria(tenant)
        wanted = (criteria[table] for table in criteria if table in mapped)
        state.statement = state.statement.options(*wanted)


def _mapped(state: ORMExecuteState) -> set[Table | None] | None:
    """The tables that a statement names by their classes; ``None`` if criteria would not reach all it reads.

    Criteria are added to mapped classes: not to text, nor to a table that is not named by
    its class. No row may change hands either: rows are inserted by flushing, which is checked.
    """
    if state.bind_mapper is None or state.is_insert:
        return None
    if state.is_update and (state.parameters or _changes_hands(state.statement)):
        return None
    statement: Any = state.statement
    parts = list(visitors.iterate(statement))
    # The statement that ``get`` makes names its class nowhere in it.
    mapped = {None, getattr(state.bind_mapper, "local_table", None)}
    mapped |= {_table(part) for part in parts if "parententity" in getattr(part, "_annotations", ())}
    hidden = any(is_text(part) or _table(part) not in mapped for part in parts)
    return None if hidden else mapped


def _changes_hands(statement: Any) -> bool:
    return not {"id", "tenant"}.isdisjoint(statement.compile().params)


def _table(part: Any) -> Table | None:
    """The table that a part of a statement is, or is a column of."""
    found = part.table if isinstance(part, Column) else part
    return found if isinstance(found, Table) else None


def is_text(part: Any) -> bool:
    """Whether a part of a statement is SQL in words, which could read anything."""
    literal = isinstance(part, ColumnClause) and part.is_literal and part.name != "*"
    return literal or isinstance(part, TextClause)


@lru_cache(maxsize=4096)
def _criteria(tenant: str) -> dict[Any, Any]:
    return {
        inspect(table).local_table: with_loader_criteria(table, column == tenant, include_aliases=True)
        for table, column in _owned_tables()
    }


def owner_columns() -> dict[FromClause, Any]:
    """The column of each table of tenants that names the tenant whose row it is."""
    return {inspect(table).local_table: column for table, column in _owned_tables()}


def _owned_tables() -> Iterator[tuple[type[Base], Any]]:
    yield tables.Tenant, tables.Tenant.id
    for table in tables.OWNED:
        yield table, table.tenant


@event.listens_for(ScopedSession, "before_flush")
def _check_rows(session: Session, *_: Any) -> None:
    scope: Scope = session.info["scope"]
    if scope.tenant is None:
        return
    for row in [*session.new, *session.dirty, *session.deleted]:
        if owner_of(row) != scope.tenant:
            raise RuntimeError(f"a row of {type(row).__name__} is not this tenant's")


def owner_of(row: Any) -> str | None:
    """The tenant that a row belongs to, ``None`` if it is the platform's."""
    if isinstance(row, tables.Tenant):
        return row.id
    owner: str | None = getattr(row, "tenant", None)
    return owner
