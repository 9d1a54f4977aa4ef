"""PostgreSQL that hangs, ends or is full: every caller has an answer in time, and nothing is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import pytest
from sqlalchemy import text
from sqlmodel import select
from tests.servers.postgres import PostgresServer
from tests.servers.proxies import Fault, Toxiproxy

from anamorph import errors
from anamorph.errors import SetupError
from anamorph_keysvc import deadline, roles
from anamorph_keysvc.database import Database, postgresql_url
from anamorph_keysvc.scope import PLATFORM
from anamorph_keysvc.tables import Tenant

pytestmark = pytest.mark.real
NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def name(postgres_server: PostgresServer, migrated: str) -> Iterator[str]:
    with postgres_server.fresh(migrated) as name:
        yield name


@pytest.fixture
def fault(postgres_server: PostgresServer, toxiproxy: Toxiproxy) -> Iterator[Fault]:
    with toxiproxy.proxy(postgres_server.port) as fault:
        yield fault


@pytest.fixture
def database(postgres_server: PostgresServer, name: str, fault: Fault) -> Iterator[Database]:
    """Behind the proxy, four connections at most."""
    database = Database.postgresql(postgres_server.dsn(name, roles.SERVICE, port=fault.port), pool_size=4)
    yield database
    database.close()


def count(database: Database) -> int:
    with database.read(PLATFORM) as session:
        return len(session.exec(select(Tenant)).all())


def count_twice(database: Database, between: Callable[[], object]) -> None:
    with database.write(PLATFORM) as session:
        session.exec(select(Tenant)).all()
        between()
        session.exec(select(Tenant)).all()


def until(holds: Callable[[], bool]) -> None:
    for _ in range(600):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("it never came about")


def test_a_connection_that_hangs_ends_at_the_deadline(database: Database, fault: Fault) -> None:
    """Half-open, before a statement or in the middle: the caller's thread is free again, with an error."""
    assert count(database) == 0
    fault.hang()
    with deadline.within(1), pytest.raises(errors.Unavailable):
        count(database)
    fault.heal()
    assert count(database) == 0
    with pytest.raises(errors.Unavailable), deadline.within(1):
        count_twice(database, between=fault.hang)
    fault.heal()
    assert count(database) == 0


def test_a_hang_leaves_no_thread_and_no_connection(
    postgres_server: PostgresServer, name: str, database: Database, fault: Fault
) -> None:
    """More callers than connections, all of them answered in time; what they held is given back."""
    assert count(database) == 0
    threads, connections = threading.active_count(), postgres_server.connections(name)
    fault.hang()
    answers: list[str | None] = []

    def call() -> None:
        try:
            with deadline.within(1):
                count(database)
        except errors.Unavailable as error:
            answers.append(error.code)

    callers = [threading.Thread(target=call) for _ in range(12)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(30)
    assert len(answers) == 12
    assert set(answers) <= {"busy", "timeout", "database_unavailable"}
    fault.heal()
    assert threading.active_count() == threads
    assert count(database) == 0
    until(lambda: postgres_server.connections(name) <= connections)


def test_no_connection_is_begun_that_could_not_end_in_time(database: Database, fault: Fault) -> None:
    """The driver gives up connecting after two seconds at the earliest: too late is refused at once."""
    fault.hang()
    for seconds, code in ((1, "busy"), (3, "database_unavailable")):
        with deadline.within(seconds), pytest.raises(errors.Unavailable) as refused:
            count(database)
        assert refused.value.code == code


@pytest.mark.slow
def test_a_restart_in_a_transaction_is_an_outage_and_then_over(
    postgres_server: PostgresServer, database: Database
) -> None:
    """What was not committed is not there; idle connections that died are noticed, not handed out."""
    with pytest.raises(errors.Unavailable):
        count_twice(database, between=postgres_server.restart)
    assert count(database) == 0
    postgres_server.restart()
    answers = []
    callers = [threading.Thread(target=lambda: answers.append(count(database))) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert answers == [0] * 8
    postgres_server.stop("fast")
    with pytest.raises(errors.Unavailable) as refused:
        count(database)
    postgres_server.start()
    assert (refused.value.code, refused.value.retry_after) == ("database_unavailable", 5)
    assert count(database) == 0


def test_an_abandoned_transaction_is_ended_by_the_server(database: Database) -> None:
    """Limits of the login role, for what a process leaves behind: they hold in whatever role it took."""
    with database.read(PLATFORM) as session:
        limits = session.connection().execute(
            text(
                "SELECT name, setting FROM pg_settings WHERE name IN"
                " ('statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout')"
            )
        )
        assert dict(map(tuple, limits)) == {
            "statement_timeout": "5000",
            "lock_timeout": "3000",
            "idle_in_transaction_session_timeout": "10000",
        }


def test_a_statement_that_takes_too_long_is_an_outage(database: Database) -> None:
    """What the server itself ends comes as the same error; a lock not had in time as ``busy``."""
    with pytest.raises(errors.Unavailable):
        run(database, "SET LOCAL statement_timeout = '10ms'", "SELECT pg_sleep(9)")
    with pytest.raises(errors.Unavailable):
        run(database, "SET LOCAL idle_in_transaction_session_timeout = '10ms'", "", "SELECT 1")
    assert count(database) == 0
    with database.write(PLATFORM) as session:
        session.add(Tenant(id="a", display_name="", kek="k", created_at=NOW))
        session.flush()
        with pytest.raises(errors.Unavailable) as refused:
            run(
                database,
                "SET LOCAL lock_timeout = '10ms'",
                "INSERT INTO tenant VALUES ('a', '', 'k', '{}', now())",
            )
    assert refused.value.code == "busy"


def run(database: Database, *statements: str) -> None:
    """Statements in one transaction, with a while between them where one is empty."""
    with database.write(PLATFORM) as session:
        for statement in statements:
            session.connection().execute(text(statement)) if statement else time.sleep(0.5)


@pytest.mark.parametrize("url", ["mysql://h/d", "sqlite:///x", "postgresql://u:secret@h/d"])
def test_a_url_that_is_no_postgresqls_or_holds_a_password_is_refused(url: str) -> None:
    """The message says where the password goes, and does not repeat it."""
    with pytest.raises(SetupError) as refused:
        postgresql_url(url)
    assert "secret" not in str(refused.value)


def test_an_error_of_the_database_does_not_quote_what_was_written(database: Database) -> None:
    """Parameters hold hashes and ciphertexts: they stay out of exceptions and logs."""
    row = Tenant(id="a", display_name="SECRET", kek="k", created_at=NOW)
    with database.write(PLATFORM) as session:
        session.add(row)
    with pytest.raises(errors.Conflict) as refused, database.write(PLATFORM) as session:
        session.add(Tenant(id="a", display_name="SECRET", kek="k2", created_at=NOW))
    assert "SECRET" not in f"{refused.value!r} {refused.value.__cause__}"
