"""A real PostgreSQL server on a free loopback port, with a data folder of its own."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psycopg
from psycopg import sql
from tests.servers.find import binary
from tests.servers.process import Program, free_port

HOST = "127.0.0.1"
SUPERUSER = "superuser"
PROGRAMS = ("postgres", "initdb")
# A superuser may run programs as the server's user, so other users of this machine must not
# become one: it needs its password. All other roles are let in without, because migrations
# create them with no password and a test must be able to be any of them.
ACCESS = f"""\
host all {SUPERUSER} {HOST}/32 scram-sha-256
host all all         {HOST}/32 trust
"""
# fast: sessions are ended, and everything is written; immediate: what a crash leaves behind.
SIGNALS = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}
How = Literal["fast", "immediate"]


@dataclass
class PostgresServer:
    """A server with its databases; only its superuser has a password.

    Args:
        folder: of the data and the log, owned by the user that the server runs as.
        durable: whether a commit outlives a crash of the machine (fsync); without, one still outlives
            a crash of the server, and everything is faster.
    """

    folder: Path
    durable: bool = False
    port: int = field(default_factory=free_port)
    password: str = field(default_factory=lambda: secrets.token_urlsafe(16), repr=False)
    _program: Program = field(init=False, repr=False)

    def __post_init__(self) -> None:
        settings = {
            "listen_addresses": HOST,
            "port": str(self.port),
            "unix_socket_directories": "",
            "hba_file": str(self.folder / "access.conf"),
            "max_connections": "200",
            **({} if self.durable else {"fsync": "off", "full_page_writes": "off"}),
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        command = [*_unprivileged(), str(self.tool("postgres")), "-D", str(self.data), *options]
        self._program = Program(command, self.log, _environment())

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def log(self) -> Path:
        """Errors, and each statement that failed with one."""
        return self.folder / "postgres.log"

    @property
    def pid(self) -> int:
        """The postmaster's process id."""
        return self._program.pid

    def tool(self, name: str) -> Path:
        """A program of the very release that runs here, such as ``pg_dump``: Debian's own picks any."""
        beside = binary("postgres").resolve().with_name(name)
        return beside if beside.exists() else binary(name)

    def url(self, database: str, user: str = SUPERUSER, *, port: int | None = None) -> str:
        """For SQLAlchemy; ``port`` that of a proxy before this server."""
        return self.dsn(database, user, port=port).replace("postgresql:", "postgresql+psycopg:", 1)

    def dsn(self, database: str, user: str = SUPERUSER, *, port: int | None = None) -> str:
        """For libpq: psycopg, ``pg_dump``, ``psql``."""
        login = f"{user}:{self.password}" if user == SUPERUSER else user
        return (
            f"postgresql://{login}@{HOST}:{port or self.port}/{database}?sslmode=disable&gssencmode=disable"
        )

    @contextmanager
    def admin(self, database: str = "postgres") -> Iterator[psycopg.Connection[Any]]:
        """A superuser's connection that commits each statement; closed at the end."""
        with psycopg.connect(self.dsn(database), autocommit=True, connect_timeout=10) as connection:
            yield connection

    def create_database(self, name: str) -> None:
        self.clone("template1", name)

    def clone(self, template: str, name: str) -> None:
        """A new database with what ``template`` holds; nobody may be connected to the template."""
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        with self.admin() as connection:
            connection.execute(statement.format(sql.Identifier(name), sql.Identifier(template)))

    def drop_database(self, name: str) -> None:
        """Remove it if it is there, whoever is connected."""
        statement = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)")
        with self.admin() as connection:
            connection.execute(statement.format(sql.Identifier(name)))

    @contextmanager
    def fresh(self, template: str = "template1") -> Iterator[str]:
        """The name of a new database that is gone afterwards; the server must run at both ends."""
        name = f"test_{secrets.token_hex(6)}"
        self.clone(template, name)
        try:
            yield name
        finally:
            self.drop_database(name)

    def connections(self, database: str) -> int:
        """How many clients are connected to it just now: leaks are counted with this."""
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()"
        with self.admin() as connection:
            row = connection.execute(query, [database]).fetchone()
        assert row is not None
        return int(row[0])

    def start(self) -> None:
        """Start on the same port and data, and wait until it answers; RuntimeError if it does not."""
        self._program.start(self._answers)

    def stop(self, how: How = "fast") -> None:
        self._program.stop(SIGNALS[how])

    def restart(self, how: How = "immediate") -> None:
        self.stop(how)
        self.start()

    def _answers(self) -> bool:
        try:
            with self.admin():
                return True
        except psycopg.OperationalError:
            return False


@contextmanager
def running_postgres(*, durable: bool = False) -> Iterator[PostgresServer]:
    """A server with empty databases, stopped and removed at the end.

    Its folder is not one of pytest's: those only root may enter when root runs the tests, and
    PostgreSQL refuses to run as root. It then runs as ``postgres`` or ``nobody``.
    """
    folder = Path(tempfile.mkdtemp(prefix="anamorph-postgres-", dir=_place()))
    try:
        for name in PROGRAMS:
            binary(name)
        server = PostgresServer(folder, durable=durable)
        _initialize(server)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


def _initialize(server: PostgresServer) -> None:
    """initdb: the data, the superuser with its password, who may connect."""
    password = server.folder / "password"
    password.write_text(server.password)
    access = server.folder / "access.conf"
    access.write_text(ACCESS)
    if user := _user():
        for path in (server.folder, password, access):
            os.chown(path, user.pw_uid, user.pw_gid)
    arguments = ["--username", SUPERUSER, "--pwfile", str(password), "--encoding=UTF8", "--locale=C"]
    command = [*_unprivileged(), str(server.tool("initdb")), "-D", str(server.data), "--no-sync", *arguments]
    with server.log.open("ab") as log:
        result = subprocess.run(
            [*command, "--auth=scram-sha-256"], env=_environment(), stdout=log, stderr=log, check=False
        )
    password.unlink()
    if result.returncode:
        raise RuntimeError(f"initdb failed:\n{server.log.read_text()[-3000:]}")


def _user() -> pwd.struct_passwd | None:
    """Whom the server runs as when we are root; None: as we are."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    return known.get("postgres") or known["nobody"]


def _unprivileged() -> list[str]:
    user = _user()
    if user is None:
        return []
    return [
        str(binary("setpriv")),
        f"--reuid={user.pw_uid}",
        f"--regid={user.pw_gid}",
        "--clear-groups",
        "--",
    ]


def _place() -> Path:
    """Where folders are made: the temporary folder, or one that an unprivileged user may enter too."""
    places = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path("/tmp")]
    return next((place for place in places if _user() is None or _enterable(place)), places[0])


def _enterable(folder: Path) -> bool:
    return all(step.stat().st_mode & stat.S_IXOTH for step in (folder, *folder.parents) if step.exists())


def _environment() -> dict[str, str]:
    """Ours, without what would change the server or a client behind the test's back; messages in English."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_"))}
    return {**kept, "LC_ALL": "C"}
