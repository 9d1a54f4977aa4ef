"""Statements that are built and narrowed once, for what every release asks of the database.

An ORM statement is narrowed each time that it is run (``scope``), which takes longer than
running it. These name tables rather than classes, get their criteria as they are built,
and take the tenant from the session that runs them: no caller can name another one.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import FromClause, Insert, Result, Select, bindparam
from sqlalchemy.sql import visitors
from sqlmodel import Session

from anamorph_keysvc import scope

_TENANT = "scope_tenant"


class PreparedSelect:
    """A query of tenants' tables.

    Args:
        statement: built of tables and their columns, with ``bindparam`` for what changes.

    Raises:
        TypeError: criteria would not reach all that it reads.
    """

    def __init__(self, statement: Select[Any]) -> None:
        owners = scope.owner_columns()
        tables = statement.get_final_froms()
        parts = list(visitors.iterate(statement))
        read = {part for part in parts if isinstance(part, FromClause)}
        if not read <= set(tables) <= set(owners) or any(scope.is_text(part) for part in parts):
            raise TypeError("a prepared query names tables of tenants only, each as a whole")
        self._open = statement
        self._narrowed = statement.where(*(owners[table] == bindparam(_TENANT) for table in tables))

    def run(self, session: Session, **parameters: Any) -> Result[*tuple[Any, ...]]:
        """The rows that the session's scope admits."""
        tenant = session.info["scope"].tenant
        if tenant is None:
            return session.connection().execute(self._open, parameters)
        return session.connection().execute(self._narrowed, {**parameters, _TENANT: tenant})


class PreparedInsert:
    """Adds rows to a table that has a column ``tenant``."""

    def __init__(self, statement: Insert) -> None:
        self._statement = statement

    def run(self, session: Session, row: dict[str, Any]) -> None:
        """Add a row.

        Raises:
            RuntimeError: it is not the tenant's whose session this is.
        """
        tenant = session.info["scope"].tenant
        if tenant not in {None, row["tenant"]}:
            raise RuntimeError("a row is not this tenant's")
        session.connection().execute(self._statement, row)
