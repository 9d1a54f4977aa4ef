"""The schema's revisions: bringing a database to this release's, and checking that it is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Connection, Engine, text

from anamorph import errors
from anamorph_keysvc import roles
from anamorph_keysvc.scope import PLATFORM

# Any number, the same in every process: it names the lock that migrations are made under.
_LOCK = 0x616E616D


def alembic_config(connection: Connection | None = None) -> Config:
    """Alembic's configuration, for a connection that is already open."""
    config = Config()
    config.set_main_option("script_location", "anamorph_keysvc:migrations")
    config.attributes["connection"] = connection
    return config


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Bring the schema to a revision, one process at a time.

    Raises:
        SetupError: the database was made by a release that this one does not know, or
            the connection is not ``anamorph_migrator``'s, who owns all that is made.
    """
    with engine.connect() as connection, _alone(connection):
        _check_owner(connection)
        try:
            command.upgrade(alembic_config(connection), revision)
        except CommandError as error:
            raise errors.SetupError(
                f"the database's revision {revision_of(connection)} is not known to this release:"
                " use the release that made it, or start with an empty database"
            ) from error


def downgrade(engine: Engine, revision: str) -> None:
    """Take the schema back to a revision; ``base`` removes everything."""
    with engine.connect() as connection, _alone(connection):
        command.downgrade(alembic_config(connection), revision)


def _check_owner(connection: Connection) -> None:
    if connection.dialect.name != "postgresql":
        return
    user = connection.execute(text("SELECT current_user")).scalar_one()
    connection.commit()
    if user != roles.MIGRATOR:
        raise errors.SetupError(
            f"the schema is upgraded as {roles.MIGRATOR}, who will own it, not as '{user}'"
            f" ('{roles.SETUP}' makes that role)"
        )


def revision_of(connection: Connection) -> str | None:
    """The revision that a database is at."""
    return MigrationContext.configure(connection).get_current_revision()


def check(engine: Engine, *, remedy: str) -> None:
    """Refuse a database whose schema is not the one of this release.

    Raises:
        SetupError: older or newer; ``remedy`` is the command that helps.
    """
    newest = ScriptDirectory.from_config(alembic_config()).get_current_head()
    # The login role has no rights: the platform's may read the revision.
    with engine.connect().execution_options(anamorph_scope=PLATFORM) as connection:
        current = revision_of(connection)
    if current != newest:
        raise errors.SetupError(
            f"the database is at revision {current}, this release needs {newest}: run '{remedy}'"
        )


@contextmanager
def _alone(connection: Connection) -> Iterator[None]:
    """Hold PostgreSQL's advisory lock of migrations; SQLite has one process anyway."""
    if connection.dialect.name != "postgresql":
        yield
        return
    connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": _LOCK})
    connection.commit()
    try:
        yield
    finally:
        connection.rollback()
        connection.execute(text("SELECT pg_advisory_unlock(:lock)"), {"lock": _LOCK})
        connection.commit()
