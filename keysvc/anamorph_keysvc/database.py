"""The database: connections, transactions, schema.

SQLite runs in WAL mode with one writer at a time: a write transaction takes the
write lock when it begins, so what it reads cannot change before it commits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlmodel import Session

from anamorph import errors

_PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON")


class Database:
    """One database; hands out sessions that are one transaction each."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @classmethod
    def sqlite(cls, path: Path, *, busy_timeout_s: float = 15) -> Database:
        """The embedded database in a file; a writer waits ``busy_timeout_s`` for the one before it."""
        # Parameters hold hashes and ciphertexts: they stay out of exceptions.
        engine = create_engine(
            f"sqlite:///{path}",
            hide_parameters=True,
            pool_size=8,
            max_overflow=56,
            connect_args={"timeout": busy_timeout_s},
        )
        event.listen(engine, "connect", _prepare)
        event.listen(engine, "begin", _begin)
        return cls(engine)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that sees one state of the database and changes nothing."""
        connection = self.engine.connect().execution_options(anamorph_read_only=True)
        with connection, _translated(), Session(connection, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that commits when the block ends well, and leaves no trace otherwise.

        Raises:
            Conflict: a constraint refused it because another transaction came first.
            Unavailable: the write lock could not be had in time.
        """
        with _translated(), Session(self.engine, expire_on_commit=False) as session, session.begin():
            session.connection()  # takes the write lock now, not at the first statement
            yield session

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def _prepare(connection: Any, _record: Any) -> None:
    # The driver's own transaction control would begin transactions too late.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in _PRAGMAS:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: Connection) -> None:
    read_only = connection.get_execution_options().get("anamorph_read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except IntegrityError as error:
        raise errors.Conflict(
            "another change came first, or the change breaks an invariant: read the object again",
            code="conflict",
        ) from error
    except OperationalError as error:
        if "locked" not in str(error.orig):
            raise
        raise errors.Unavailable("the database is busy; try again", code="busy", retry_after=1) from error


def alembic_config(connection: Connection | None = None) -> Config:
    """Alembic's configuration, for a connection that is already open."""
    config = Config()
    config.set_main_option("script_location", "anamorph_keysvc:migrations")
    config.attributes["connection"] = connection
    return config


def upgrade(database: Database) -> None:
    """Bring the schema to the newest revision."""
    with database.engine.connect() as connection:
        command.upgrade(alembic_config(connection), "head")


def check_schema(database: Database) -> None:
    """Refuse a database whose schema is not the one of this release.

    Raises:
        SetupError: older or newer.
    """
    newest = ScriptDirectory.from_config(alembic_config()).get_current_head()
    with database.engine.connect() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
    if current != newest:
        raise errors.SetupError(
            f"the database is at revision {current}, this release needs {newest}: run 'anamorph-keysvc init'"
        )
