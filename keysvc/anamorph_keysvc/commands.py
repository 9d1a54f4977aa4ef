"""``anamorph-keysvc database setup|upgrade|counts``: PostgreSQL's roles, schema and contents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import DBAPIError

from anamorph.errors import SetupError
from anamorph_keysvc import roles, schema
from anamorph_keysvc.database import postgresql_url
from anamorph_keysvc.tables import Tenant

database_cli = typer.Typer(no_args_is_help=True, help="PostgreSQL as the service's database.")

UrlOption = Annotated[
    str, typer.Option("--url", help="postgresql://ROLE@HOST/DATABASE; the password from PGPASSFILE")
]
JsonOption = Annotated[bool, typer.Option("--json", help="for programs")]


@database_cli.command()
def setup(url: UrlOption, as_json: JsonOption = False) -> None:
    """Make the service's roles where they are missing, as an administrator of the server."""
    with _engine(url) as engine, engine.begin() as connection:
        done = roles.setup(connection)
    if as_json:
        typer.echo(json.dumps({"done": done}))
        return
    for line in done or ["nothing to do"]:
        typer.echo(line)


@database_cli.command()
def upgrade(url: UrlOption) -> None:
    """Bring the schema to this release's, as ``anamorph_migrator``; one process at a time."""
    with _engine(url) as engine:
        schema.upgrade(engine)
        with engine.connect() as connection:
            typer.echo(f"the database is at revision {schema.revision_of(connection)}")


@database_cli.command()
def counts(url: UrlOption, as_json: JsonOption = False) -> None:
    """Count the rows of every table, as ``anamorph_backup``: compare a restored backup by them."""
    with _engine(url) as engine:
        found = count_rows(engine)
    if as_json:
        typer.echo(json.dumps(found))
        return
    table = Table("table", "rows")
    for name, rows in found.items():
        table.add_row(name, str(rows))
    Console().print(table)


def count_rows(engine: Engine) -> dict[str, int]:
    """Rows of every table of the service, all at one moment.

    Raises:
        SetupError: the role does not see all rows: row security would hide some without a word.
    """
    with engine.connect() as connection:
        connection = connection.execution_options(isolation_level="REPEATABLE READ")
        if not connection.execute(text(_SEES_ALL)).scalar_one():
            raise SetupError("this role is bound by row security: count as anamorph_backup")
        # The names are our own tables'.
        return {
            name: connection.execute(text(f'SELECT count(*) FROM "{name}"')).scalar_one()  # noqa: S608
            for name in sorted(Tenant.metadata.tables)
        }


_SEES_ALL = "SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = current_user"


@contextmanager
def _engine(url: str) -> Iterator[Engine]:
    engine = create_engine(postgresql_url(url), hide_parameters=True, connect_args={"connect_timeout": 5})
    try:
        yield engine
    except DBAPIError as error:
        raise SetupError(f"the database refused: {str(error.orig).strip()}") from None
    finally:
        engine.dispose()
