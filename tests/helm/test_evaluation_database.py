"""The evaluation profile's PostgreSQL: its start script, then roles, passwords and schema by its Job."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from tests.helm.chart import CHART
from tests.helm.scripts import script
from tests.servers.find import binary
from tests.servers.kube import write_certificates
from tests.servers.postgres import _environment, _place, _unprivileged, _user
from tests.servers.process import Program, free_port

pytestmark = [pytest.mark.real, pytest.mark.slow]

PASSWORDS = {"superuser": "super:with\\marks", "service": "one", "migrator": "two"}


@dataclass
class Database:
    folder: Path
    port: int
    program: Program

    def run(self) -> None:
        """What the Job does."""
        database = script("evaluation_database")
        database.main(
            "127.0.0.1", str(self.port), "anamorph", str(self.folder / "ca.crt"), self.folder / "passwords"
        )

    def connect(self, user: str, password: str) -> psycopg.Connection[tuple[object, ...]]:
        place = f"host=127.0.0.1 port={self.port} dbname=anamorph sslmode=verify-full"
        return psycopg.connect(place, sslrootcert=str(self.folder / "ca.crt"), user=user, password=password)


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    binary("initdb")
    folder = Path(tempfile.mkdtemp(prefix="anamorph-evaluation-", dir=_place()))
    port = free_port()
    _files(folder)
    variables = {
        **_environment(),
        "ETC": str(folder / "etc"),
        "DATA": str(folder / "pgdata"),
        "PGPORT": str(port),
    }
    command = [*_unprivileged(), "sh", str(folder / "start.sh")]
    program = Program(command, folder.parent / f"{folder.name}.log", variables)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("PGPASSFILE", raising=False)
    try:
        program.start(lambda: _listens(port))
        yield Database(folder, port, program)
    finally:
        program.stop()
        shutil.rmtree(folder)
        program.log.unlink()


def _files(folder: Path) -> None:
    """What Secrets and ConfigMaps bring, each where the pod has it."""
    write_certificates(folder)
    shutil.copy(CHART / "files" / "evaluation_postgresql.sh", folder / "start.sh")
    for name in ("etc/password", "etc/config", "etc/tls", "passwords"):
        (folder / name).mkdir(parents=True)
    (folder / "etc/config/access.conf").write_text("hostssl all all all scram-sha-256\n")
    (folder / "etc/password/superuser").write_text(PASSWORDS["superuser"])
    shutil.copy(folder / "server.crt", folder / "etc/tls/tls.crt")
    shutil.copy(folder / "server.key", folder / "etc/tls/tls.key")
    (folder / "etc/tls/tls.key").chmod(0o600)
    for name, password in PASSWORDS.items():
        (folder / "passwords" / name).write_text(password)
    if user := _user():
        for path in (folder, *folder.rglob("*")):
            os.chown(path, user.pw_uid, user.pw_gid)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_it_comes_up_with_roles_and_schema(database: Database) -> None:
    """The service and the migrator log in over TLS with their passwords; a second run changes nothing."""
    database.run()
    database.run()
    with database.connect("anamorph_service", "one") as service:
        assert service.execute("SELECT session_user").fetchone() == ("anamorph_service",)
    with database.connect("anamorph_migrator", "two") as migrator:
        found = migrator.execute("SELECT count(*) FROM alembic_version").fetchone()
        assert found == (1,)


def test_a_wrong_password_is_refused(database: Database) -> None:
    """The control: passwords are asked for."""
    database.run()
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        database.connect("anamorph_service", "two").close()
