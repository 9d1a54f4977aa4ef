"""The databases that the key service is tested on: a home's SQLite file, and PostgreSQL as in production."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import Engine, create_engine
from tests.servers.postgres import SUPERUSER, PostgresServer

from anamorph_keysvc import roles, schema
from anamorph_keysvc.database import Database
from anamorph_keysvc.homes import Home
from anamorph_keysvc.tables import Tenant


class Databases(Protocol):
    """Opens the database of a home, as the service does, and for the tests' own SQL."""

    def open(self, home: Home) -> tuple[Database, Engine]:
        """As the service, and as an administrator whom no missing right stops before a constraint does."""
        ...


class SqliteFiles:
    """Each home has its file, whose one user may do everything."""

    def open(self, home: Home) -> tuple[Database, Engine]:
        database = Database.sqlite(home.database)
        return database, database.engine


class EmptiedPostgres:
    """One database, emptied for each home that is new to it; two worlds of one home share it.

    That takes milliseconds, a clone of a template ten times as long.
    """

    def __init__(self, server: PostgresServer, name: str, admin: Engine) -> None:
        self._server, self._name, self._admin = server, name, admin
        self._home: Path | None = None

    def open(self, home: Home) -> tuple[Database, Engine]:
        if home.path != self._home:
            self._empty()
            self._home = home.path
        return Database.postgresql(self._server.dsn(self._name, roles.SERVICE)), self._admin

    def _empty(self) -> None:
        deletions = "; ".join(f"DELETE FROM {table.name}" for table in Tenant.metadata.sorted_tables)
        with self._admin.begin() as connection:
            # Neither triggers nor foreign keys, which would keep the audit log.
            connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
            connection.exec_driver_sql(deletions)


@contextmanager
def engine_of(server: PostgresServer, name: str, user: str) -> Iterator[Engine]:
    """An engine on a database of the server, as ``user``; disposed of at the end."""
    engine = create_engine(server.url(name, user), pool_size=2, pool_pre_ping=True)
    try:
        yield engine
    finally:
        engine.dispose()


def set_up(server: PostgresServer, name: str) -> None:
    """Make the roles, and bring an empty database to the newest revision, as documented."""
    set_up_roles(server, name)
    with engine_of(server, name, roles.MIGRATOR) as engine:
        schema.upgrade(engine)


def set_up_roles(server: PostgresServer, name: str) -> None:
    with engine_of(server, name, SUPERUSER) as admin, admin.begin() as connection:
        roles.setup(connection)


def sql(engine: Engine, statement: str, *values: object) -> list[Any]:
    """Run a statement with ``?`` for values, and commit."""
    if engine.dialect.name == "postgresql":
        statement = statement.replace("%", "%%").replace("?", "%s")
    with engine.begin() as connection:
        result = connection.exec_driver_sql(statement, values)
        return list(result) if result.returns_rows else []
