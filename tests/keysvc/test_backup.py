"""The drill of docs/reliability.md: backup, restore, and what shredding does to older backups."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from tests.keysvc.faults.calls import ask, until
from tests.keysvc.test_production import AT, POLICY, admin_of, make_active
from tests.servers.process import PATIENCE_S

from anamorph import errors
from anamorph.wire.admin import ApiKeyCreate, BackupCreate, Role
from anamorph.wire.keyservice import KeyService, everything
from anamorph.wire.states import State
from anamorph_keysvc import config as configs
from anamorph_keysvc import roles
from anamorph_keysvc.vault.auth import Vault
from anamorph_keysvc.vault.wrapper import VaultTransitWrapper
from anamorph_keysvc.wrapper import root_context

if TYPE_CHECKING:
    from tests.servers.production import KeyServiceProcess, Production

pytestmark = [pytest.mark.real, pytest.mark.slow]


def run(production: Production, tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One of PostgreSQL's programs, with what it says."""
    command = [str(production.postgres.tool(tool)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def dump(production: Production, name: str, user: str = roles.BACKUP, *more: str) -> Path:
    path = production.folder / name
    arguments = ["--format=custom", f"--file={path}", f"--dbname={production.url(user)}", *more]
    done = run(production, "pg_dump", *arguments)
    assert done.returncode == 0, done.stderr
    return path


def counted(production: Production) -> dict[str, int]:
    """Rows of every table, as the documented command prints them."""
    url = production.url(roles.BACKUP)
    found: dict[str, int] = json.loads(production.command("database", "counts", "--url", url, "--json"))
    return found


@contextmanager
def restored(production: Production, path: Path) -> Iterator[Production]:
    """The same service on a new database, which a backup was restored into."""
    with production.postgres.fresh() as name:
        folder = production.folder / name
        folder.mkdir()
        other = replace(production, folder=folder, database=name, started=[])
        other.platform_key_file.write_text(production.platform_key_file.read_text())
        other.platform_key_file.chmod(0o600)
        superuser = production.postgres.dsn(name)
        other.command("database", "setup", "--url", other.url("superuser"))
        done = run(
            production,
            "pg_restore",
            "--exit-on-error",
            "--single-transaction",
            f"--dbname={superuser}",
            str(path),
        )
        assert done.returncode == 0, done.stderr
        try:
            yield other
        finally:
            for process in other.started:
                process.program.stop()


def make_client(platform: KeyService) -> str:
    return platform.create_api_key("acme", ApiKeyCreate(name="client", role=Role.CLIENT)).secret


def key_of(process: KeyServiceProcess, client: str, version: int) -> bytes:
    with KeyService(process.url, client) as keys:
        return keys.release(*AT, version, "client").material()


def shredded(production: Production, process: KeyServiceProcess, version: int) -> None:
    """Retire a draining version, destroy it, and see its KEK's old versions trimmed after a new backup."""
    with production.platform(process) as platform:
        until(lambda: platform.get_version(*AT, version).state is State.DRAINING)
        time.sleep(POLICY.grace_s)
        platform.retire(*AT, version)
        admin = platform.create_api_key("acme", ApiKeyCreate(name="destroyer", role=Role.ADMIN)).secret
        with KeyService(process.url, admin) as keys:
            keys.destroy(*AT, version)
            platform.destroyed(*AT, version)
            (shredding,) = [one for one in everything(keys.list_operations, "acme") if one.kind == "shred"]
            until(lambda: keys.get_operation("acme", shredding.id).phase == "await-backup")


def finish_shredding(production: Production, process: KeyServiceProcess) -> None:
    with production.platform(process) as platform:
        platform.record_backup(BackupCreate(taken_at=datetime.now(UTC)))
        until(lambda: _open_shredding(production) == 0, 90)


def _open_shredding(production: Production) -> int:
    query = "SELECT count(*) FROM operation WHERE kind = 'shred' AND status = 'running'"
    with psycopg.connect(production.postgres.dsn(production.database, roles.BACKUP)) as connection:
        row = connection.execute(query).fetchone()
    assert row is not None
    return int(row[0])


def test_a_dump_under_row_security_is_refused_or_empty(production: Production) -> None:
    """Why there is a role for backups: another one's dump fails, or succeeds with no rows in it."""
    with production.postgres.admin(production.database) as connection:
        connection.execute("DROP ROLE IF EXISTS reporting")
        connection.execute("CREATE ROLE reporting LOGIN IN ROLE pg_read_all_data")
    process = production.process("one")
    with production.platform(process) as platform, admin_of(production, process):
        assert platform.get_tenant("acme").id == "acme"
    try:
        refused = run(production, "pg_dump", f"--dbname={production.url('reporting')}")
        assert refused.returncode != 0
        assert "row-level security" in refused.stderr
        silent = run(
            production, "pg_dump", "--enable-row-security", f"--dbname={production.url('reporting')}"
        )
        assert silent.returncode == 0
        assert "acme" not in silent.stdout  # complete by every sign, and without one row of a tenant
        assert "acme" in run(production, "pg_dump", f"--dbname={production.url(roles.BACKUP)}").stdout
        with pytest.raises(AssertionError, match="count as anamorph_backup"):
            production.command("database", "counts", "--url", production.url("reporting"))
    finally:
        with production.postgres.admin(production.database) as connection:
            connection.execute("DROP ROLE reporting")


def test_a_restored_service_is_the_same_service(production: Production) -> None:
    """Every table has its rows, every key opens, and life goes on where the backup was taken."""
    process = production.process("before")
    with admin_of(production, process) as admin, production.platform(process) as platform:
        admin.rotate(*AT)
        make_active(production, process, 1)
        client = make_client(platform)
        known = key_of(process, client, 1)
    process.program.stop()  # so that nothing is written between dump and count
    path, rows = dump(production, "backup.dump"), counted(production)
    assert rows["key_version"] == 1
    assert min(rows[name] for name in ("tenant", "audit", "api_key", "signing_key")) > 0
    with restored(production, path) as other:
        assert counted(other) == rows
        revived = other.process("after")
        assert ask(revived, "GET", "/readyz").status == 200
        assert key_of(revived, client, 1) == known
        with other.platform(revived) as platform:
            operation = platform.rotate(*AT)
            until(lambda: platform.get_version(*AT, operation.version).key_id is not None)
        make_active(other, revived, 2)


def test_after_shredding_older_backups_open_nothing(production: Production) -> None:
    """Neither what was destroyed nor what lives opens from a backup of before; a newer one is whole."""
    process = production.process("one")
    with admin_of(production, process) as admin, production.platform(process) as platform:
        admin.rotate(*AT)
        make_active(production, process, 1)
        old = dump(production, "old.dump")
        admin.rotate(*AT)
        make_active(production, process, 2)
        client = make_client(platform)
        known = key_of(process, client, 2)
    older = dump(production, "older.dump")
    shredded(production, process, 1)
    new = dump(production, "new.dump")
    finish_shredding(production, process)
    assert key_of(process, client, 2) == known
    process.program.stop()
    with restored(production, old) as other:
        assert roots(other) == {1: "does not open"}
    with restored(production, older) as other:
        assert roots(other) == {1: "does not open", 2: "does not open"}
    with restored(production, new) as other:
        assert roots(other) == {2: "opens"}
        revived = other.process("after")
        assert key_of(revived, client, 2) == known


def roots(production: Production) -> dict[int, str]:
    """What becomes of each ciphertext in a database when Vault is asked to open it."""
    query = "SELECT version, ciphertext, kek FROM key_version JOIN tenant ON tenant.id = key_version.tenant"
    with psycopg.connect(production.postgres.dsn(production.database, roles.BACKUP)) as connection:
        rows = connection.execute(f"{query} WHERE ciphertext IS NOT NULL").fetchall()
    with ExitStack() as ends:
        vault = Vault.open(configs.load(production.config("opener")).vault)
        ends.callback(vault.close)
        wrapper = VaultTransitWrapper(vault)
        return {version: _opens(wrapper, version, *rest) for version, *rest in rows}


def _opens(wrapper: VaultTransitWrapper, version: int, *stored: Any) -> str:
    ciphertext, kek = stored
    try:
        wrapper.unwrap(kek, bytes(ciphertext), root_context(*AT, version))
    except errors.InvalidKey:
        return "does not open"
    return "opens"
