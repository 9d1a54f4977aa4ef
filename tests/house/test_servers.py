"""The real servers that other tests rely on: they start, fail when told to, recover, and end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import psycopg
import pytest
from tests.servers.find import binary
from tests.servers.process import Program

if TYPE_CHECKING:
    from tests.servers.postgres import PostgresServer
    from tests.servers.proxies import Toxiproxy

HOST = "127.0.0.1"


def a_program(folder: Path, name: str) -> Path:
    file = folder / name
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    return file


def test_chosen_folder_comes_before_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in the folder that ANAMORPH_TEST_BIN names is taken, whatever PATH offers."""
    monkeypatch.setenv("ANAMORPH_TEST_BIN", str(tmp_path))
    assert binary("sh").parent != tmp_path
    assert binary(a_program(tmp_path, "sh").name) == tmp_path / "sh"


@pytest.mark.parametrize(
    ("name", "source"), [("initdb", "Debian package postgresql-15"), ("vault", "its project")]
)
def test_missing_program_skips_with_the_remedy(
    name: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a program is missing, the test is skipped and its reason says what to install, and where."""
    monkeypatch.setattr("tests.servers.find.DEBIAN", Path("/nonexistent"))
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("ANAMORPH_TEST_BIN", raising=False)
    with pytest.raises(pytest.skip.Exception, match=f"needs {name}: install it.*{source}.*ANAMORPH_TEST_BIN"):
        binary(name)


def test_program_that_ends_early_shows_its_log(tmp_path: Path) -> None:
    """A server that does not come up is an error with the end of its log, and no process is left."""
    program = Program(["sh", "-c", "echo no such disk; exit 3"], tmp_path / "log")
    with pytest.raises(RuntimeError, match=r"ended while it started[^$]*no such disk"):
        program.start(lambda: False)
    assert not program.running


def test_no_server_is_our_child_after_its_end(tmp_path: Path) -> None:
    """What a test process starts it also reaps: no zombie stays."""
    program = Program(["sleep", "60"], tmp_path / "log")
    program.start(lambda: bool(psutil.Process(program.pid).environ()))
    pid = program.pid
    program.stop()
    assert pid not in {child.pid for child in psutil.Process(os.getpid()).children()}


def test_own_environment_keeps_the_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server with an environment of its own can still be found by what looks for leftovers."""
    monkeypatch.setenv("ANAMORPH_CI_MARK", "here")
    program = Program(["/bin/sleep", "60"], tmp_path / "log", {"A": "b"})
    program.start(lambda: True)
    try:
        assert psutil.Process(program.pid).environ() == {"ANAMORPH_CI_MARK": "here", "A": "b"}
    finally:
        program.stop()


def rows(server: PostgresServer, database: str) -> list[int]:
    with server.admin(database) as connection:
        return [number for (number,) in connection.execute("SELECT n FROM t ORDER BY n")]


@pytest.fixture
def database(postgres_server: PostgresServer) -> Iterator[str]:
    """A database with one table of one row."""
    with postgres_server.fresh() as name:
        with postgres_server.admin(name) as connection:
            connection.execute("CREATE TABLE t (n int)")
            connection.execute("INSERT INTO t VALUES (1)")
        yield name


@pytest.mark.real
def test_postgres_runs_unprivileged(postgres_server: PostgresServer) -> None:
    """The server is PostgreSQL 15 or newer, and does not run as root."""
    assert psutil.Process(postgres_server.pid).uids().real != 0
    with postgres_server.admin() as connection:
        assert connection.info.server_version >= 150_000


@pytest.mark.real
def test_immediate_restart_keeps_what_was_committed(postgres_server: PostgresServer, database: str) -> None:
    """A crash in mid-transaction keeps each committed row and no other, on the same port."""
    with psycopg.connect(postgres_server.dsn(database)) as connection:
        connection.execute("INSERT INTO t VALUES (2)")
        connection.commit()
        connection.execute("INSERT INTO t VALUES (3)")
        postgres_server.restart("immediate")
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    assert rows(postgres_server, database) == [1, 2]


@pytest.mark.real
def test_clone_is_a_copy(postgres_server: PostgresServer, database: str) -> None:
    """A clone holds the template's rows; it is gone with its end, even while somebody is connected."""
    with postgres_server.fresh(database) as copy:
        assert rows(postgres_server, copy) == [1]
        left_open = psycopg.connect(postgres_server.dsn(copy))
        assert postgres_server.connections(copy) == 1
    left_open.close()
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        psycopg.connect(postgres_server.dsn(copy))


@pytest.mark.real
def test_only_the_superuser_needs_its_password(postgres_server: PostgresServer, database: str) -> None:
    """Other roles are let in as they are; nobody becomes superuser without the password."""
    name = f"role_{database}"
    with postgres_server.admin() as connection:
        connection.execute(f"CREATE ROLE {name} LOGIN")
    psycopg.connect(postgres_server.dsn(database, name)).close()
    with postgres_server.admin() as connection:
        connection.execute(f"DROP ROLE {name}")
    without = postgres_server.dsn(database).replace(postgres_server.password, "wrong")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(without)


@pytest.mark.real
def test_postgres_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its end its process and folder are gone; a temporary folder only for root is no harm."""
    from tests.servers.postgres import running_postgres

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with running_postgres(durable=True) as server:
        pid = server.pid
        with server.admin() as connection:
            assert connection.execute("SHOW fsync").fetchone() == ("on",)
    assert not psutil.pid_exists(pid)
    assert not server.folder.exists()


@pytest.mark.real
def test_postgres_behind_a_fault(
    toxiproxy: Toxiproxy, postgres_server: PostgresServer, database: str
) -> None:
    """PostgreSQL is reached through a fault's port by the same URL with another port."""
    with toxiproxy.proxy(postgres_server.port) as fault:
        connection = psycopg.connect(postgres_server.dsn(database, port=fault.port))
        with connection:
            assert connection.execute("SELECT n FROM t").fetchall() == [(1,)]
