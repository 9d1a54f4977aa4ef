"""The database: connections, transactions, credentials' lookup.

A session is one transaction and has a scope. SQLite runs in WAL mode with one writer at
a time: a write transaction takes the write lock when it begins, so what it reads cannot
change before it commits. On PostgreSQL rows are locked as they are read for a change.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from psycopg import sql
from sqlalchemy import Connection, Engine, TextClause, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlmodel import Session

from anamorph import errors
from anamorph_keysvc import deadline
from anamorph_keysvc.scope import Scope, ScopedSession
from anamorph_keysvc.watchdog import Watchdog

_PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON")
# Without a request's deadline around it, a transaction may take this long.
_LONGEST_S = 30.0
_RETRIED = {"40001", "40P01", "55P03"}  # serialization failure, deadlock, a lock not had in time
# No driver gives up connecting sooner.
_CONNECT_S = 2
# Connections for lookups of credentials, each held for one statement.
_LOOKUPS = 4


@dataclass(frozen=True)
class Credential:
    """What is stored of an API key (``role``) or a grant (``model``, ``version``)."""

    id: str
    tenant: str | None
    role: str | None
    model: str | None
    version: int | None
    revoked: bool


class Database:
    """One database; hands out sessions that are one transaction each."""

    def __init__(self, engine: Engine, *, most: int = 64, lookups: Engine | None = None) -> None:
        self.engine = engine
        self._lookups = lookups
        self._watchdog = Watchdog()
        # A pool would let callers wait for as long as it likes, not for as long as they have.
        self._free = threading.BoundedSemaphore(most)
        self._free_lookups = threading.BoundedSemaphore(_LOOKUPS)

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
        event.listen(engine, "begin", _begin_sqlite)
        return cls(engine)

    @classmethod
    def postgresql(cls, url: str, *, pool_size: int = 16) -> Database:
        """A PostgreSQL database, as the login role ``anamorph_service``.

        ``url`` is SQLAlchemy's or libpq's; its password comes from libpq's password file
        or from certificates, not from the URL.

        Raises:
            SetupError: not a PostgreSQL URL, or one with a password in it.
        """
        engine = _pool(url, pool_size)
        event.listen(engine, "connect", _begin_by_ourselves)
        event.listen(engine, "begin", _begin_postgresql)
        # Every request begins with one statement that needs no transaction: without one it is one
        # exchange with the server instead of three.
        lookups = _pool(url, _LOOKUPS, isolation_level="AUTOCOMMIT")
        event.listen(lookups, "connect", _become_api)
        return cls(engine, most=pool_size, lookups=lookups)

    @property
    def dialect(self) -> str:
        """``sqlite`` or ``postgresql``."""
        return self.engine.dialect.name

    @contextmanager
    def read(self, scope: Scope) -> Iterator[Session]:
        """A transaction that sees one state of the database and changes nothing."""
        with (
            translated(),
            self._begun(scope, read_only=True) as connection,
            ScopedSession(connection, scope) as session,
        ):
            yield session

    @contextmanager
    def write(self, scope: Scope) -> Iterator[Session]:
        """A transaction that commits when the block ends well, and leaves no trace otherwise.

        Raises:
            Conflict: a constraint refused it because another transaction came first.
            Unavailable: the database cannot be reached, or not in time.
        """
        with translated(), self._begun(scope, read_only=False) as connection:
            with ScopedSession(connection, scope) as session:
                session.info["locks"] = True
                yield session
                session.flush()
            connection.commit()

    def find_credential(self, hashed: str) -> Credential | None:
        """The API key or grant with this hash, whosever it is."""
        # Before a tenant is known; on PostgreSQL a function is all that sees every tenant's.
        source = "find_credential(:hash)" if self.dialect == "postgresql" else _CREDENTIALS
        statement = text(f"SELECT id, tenant, role, model, version, revoked FROM {source}")  # noqa: S608
        with translated():
            row = self._look_up(statement, {"hash": hashed})
        if row is None:
            return None
        return Credential(row.id, row.tenant, row.role, row.model, row.version, bool(row.revoked))

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()
        if self._lookups is not None:
            self._lookups.dispose()
        self._watchdog.close()

    def _look_up(self, statement: TextClause, parameters: dict[str, str]) -> Any:
        """The one row of a query that belongs to no transaction, or ``None``."""
        if self._lookups is None:
            with self._begun(Scope("anamorph_api"), read_only=True) as connection:
                return connection.execute(statement, parameters).one_or_none()
        with self._turn(self._free_lookups):
            try:
                return self._ask(self._lookups, statement, parameters)
            except DBAPIError as error:
                if not error.connection_invalidated:
                    raise
            # The server was restarted since; the pool has thrown away what it held.
            return self._ask(self._lookups, statement, parameters)

    def _ask(self, engine: Engine, statement: TextClause, parameters: dict[str, str]) -> Any:
        connection = engine.connect()
        with self._watched(connection, deadline.left(_LONGEST_S)), connection:
            return connection.execute(statement, parameters).one_or_none()

    @contextmanager
    def _begun(self, scope: Scope, *, read_only: bool) -> Iterator[Connection]:
        """A connection with a transaction begun, closed after the block however it ends."""
        options: dict[str, Any] = {"anamorph_scope": scope, "anamorph_read_only": read_only}
        with self._turn(self._free):
            for again in (True, False):
                connection = self.engine.connect()
                with self._watched(connection, deadline.left(_LONGEST_S)), connection:
                    if _began(connection, options, again=again):
                        yield connection
                        return

    @contextmanager
    def _turn(self, free: threading.BoundedSemaphore) -> Iterator[None]:
        if not free.acquire(timeout=deadline.left(_LONGEST_S)):
            raise _busy()
        try:
            yield
        finally:
            free.release()

    @contextmanager
    def _watched(self, connection: Connection, seconds: float) -> Iterator[None]:
        if self.dialect != "postgresql":
            yield
            return
        driver: Any = connection.connection.driver_connection
        with self._watchdog.watch(driver.fileno(), seconds):
            yield


def _pool(url: str, size: int, **options: Any) -> Engine:
    """Connections to PostgreSQL, ``size`` at most."""
    engine = create_engine(
        postgresql_url(url),
        # Parameters hold hashes and ciphertexts: they stay out of exceptions.
        hide_parameters=True,
        pool_size=size,
        max_overflow=0,
        # Restarted servers are noticed when a connection is used, and there retried.
        connect_args={"connect_timeout": _CONNECT_S, "application_name": "anamorph-keysvc"},
        **options,
    )
    event.listen(engine, "do_connect", _refuse_late)
    return engine


def postgresql_url(url: str) -> str:
    """``url`` for SQLAlchemy with the psycopg driver.

    Raises:
        SetupError: not a PostgreSQL URL, or one with a password in it.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() not in {"postgresql", "postgres"}:
        raise errors.SetupError("the database's URL starts with 'postgresql://'")
    if parsed.password:
        raise errors.SetupError(
            "no password in the database's URL: put it into a password file (PGPASSFILE, ~/.pgpass)"
        )
    return parsed.set(drivername="postgresql+psycopg").render_as_string()


def _began(connection: Connection, options: dict[str, Any], *, again: bool) -> bool:
    """Begin the transaction; ``False`` if the pooled connection was dead and another may be tried."""
    try:
        connection.execution_options(**options).begin()
    except DBAPIError as error:
        if again and error.connection_invalidated:
            return False
        raise
    return True


_CREDENTIALS = """(
    SELECT id, tenant, role, NULL AS model, NULL AS version, revoked_at IS NOT NULL AS revoked
        FROM api_key WHERE hash = :hash
    UNION ALL SELECT id, tenant, NULL, model, version, FALSE FROM release_grant WHERE hash = :hash
)"""


def _prepare(connection: Any, _record: Any) -> None:
    # The driver's own transaction control would begin transactions too late.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in _PRAGMAS:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    read_only = connection.get_execution_options().get("anamorph_read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def _begin_by_ourselves(connection: Any, _record: Any) -> None:
    # The driver's own BEGIN would be an exchange with the server by itself.
    connection.autocommit = True


def _become_api(connection: Any, _record: Any) -> None:
    # The login role has no rights of its own; none of the three sees a tenant's rows without its name.
    connection.execute("SET ROLE anamorph_api")


def _refuse_late(*_: Any) -> None:
    """Begin no new connection that could take longer than there is time."""
    if deadline.left(_CONNECT_S) < _CONNECT_S:
        raise _busy()


def _begin_postgresql(connection: Connection) -> None:
    options = connection.get_execution_options()
    begin = _beginning(options.get("anamorph_scope"), read_only=options.get("anamorph_read_only", False))
    connection.exec_driver_sql(begin, execution_options={"no_parameters": True})


@lru_cache(maxsize=4096)
def _beginning(scope: Scope | None, *, read_only: bool) -> str:
    """Begin with the scope's role and tenant for this transaction; without a scope, nothing is allowed."""
    begin = sql.SQL("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY" if read_only else "BEGIN")
    if scope is None:
        return begin.as_string()
    # Literals, since several statements in one exchange with the server take no parameters.
    take = sql.SQL("; SELECT set_config('role', {}, true), set_config('anamorph.tenant', {}, true)")
    return (begin + take.format(scope.role, scope.tenant or "")).as_string()


@contextmanager
def translated() -> Iterator[None]:
    """What the database raises, as errors of ours.

    Raises:
        Conflict: a constraint was hit.
        Unavailable: the database is away or busy.
    """
    try:
        yield
    except IntegrityError as error:
        raise errors.Conflict(
            "another change came first, or the change breaks an invariant: read the object again",
            code="conflict",
        ) from error
    except PoolTimeout as error:
        raise _busy() from error
    except DBAPIError as error:
        if "locked" in str(error.orig) or getattr(error.orig, "sqlstate", None) in _RETRIED:
            raise _busy() from error
        # What ends a connection comes as errors of several kinds.
        if not (isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated):
            raise
        raise errors.Unavailable(
            "the database does not answer; try again", code="database_unavailable", retry_after=5
        ) from error


def _busy() -> errors.Unavailable:
    return errors.Unavailable("the database is busy; try again", code="busy", retry_after=1)
