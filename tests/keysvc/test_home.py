"""Setting a home up, opening it, and what start-up refuses."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from sqlmodel import select
from typer.testing import CliRunner

from anamorph.errors import SetupError
from anamorph.wire.checkpoints import read_public_keys
from anamorph_keysvc.checkpoints import FILE_NAME, LocalSigner
from anamorph_keysvc.credentials import hashed
from anamorph_keysvc.homes import Home, init, open_service
from anamorph_keysvc.main import cli
from anamorph_keysvc.scope import PLATFORM
from anamorph_keysvc.service.work import Service, utc_now
from anamorph_keysvc.tables import ApiKey


def opened(home: Home, *, production: bool = False) -> Service:
    return open_service(home, production=production, clock=utc_now, entropy=os.urandom)


def contents(home: Home) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (home.wrapping_key, home.platform_key)}


def valid_platform_keys(home: Home) -> list[str]:
    service = opened(home)
    with service.database.read(PLATFORM) as session:
        rows = session.exec(select(ApiKey)).all()
    service.database.close()
    return [row.hash for row in rows if row.revoked_at is None]


def test_everything_in_a_home_is_its_owners_alone(home: Home) -> None:
    """Folder 0700, keys and database 0600."""
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700
    for path in (home.wrapping_key, home.platform_key, home.database):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name


def test_init_again_changes_nothing(home: Home) -> None:
    """Keys stay, and so does the platform key's hash."""
    before = contents(home), valid_platform_keys(home)
    init(home, utc_now, os.urandom)
    assert (contents(home), valid_platform_keys(home)) == before


def test_a_lost_platform_key_is_replaced_and_revoked(home: Home) -> None:
    """Delete the file and run init: a new key is valid, the old one no more."""
    old = home.platform_key.read_text()
    home.platform_key.unlink()
    init(home, utc_now, os.urandom)
    assert home.platform_key.read_text() != old
    assert valid_platform_keys(home) == [hashed(home.platform_key.read_text())]


def test_init_never_replaces_a_wrapping_key_that_a_database_needs(home: Home) -> None:
    """A new wrapping key beside an old database would look fine and open nothing."""
    home.wrapping_key.unlink()
    with pytest.raises(SetupError, match="restore it"):
        init(home, utc_now, os.urandom)
    assert not home.wrapping_key.exists()


@pytest.mark.parametrize("name", ["wrapping.key", "platform-admin.key", "keysvc.db"])
def test_start_up_refuses_what_others_can_read(home: Home, name: str) -> None:
    """The message says what to run."""
    (home.path / name).chmod(0o640)
    with pytest.raises(SetupError, match="chmod 600"):
        opened(home)


def test_a_home_that_others_can_enter_is_refused(home: Home) -> None:
    """Also for init."""
    home.path.chmod(0o755)
    with pytest.raises(SetupError, match="chmod 700"):
        init(home, utc_now, os.urandom)


def test_a_wrapping_key_behind_a_link_is_refused(home: Home, tmp_path: Path) -> None:
    """A link's own permissions are wide, whatever it points to."""
    home.wrapping_key.rename(tmp_path / "elsewhere")
    home.wrapping_key.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SetupError):
        opened(home)


def test_production_refuses_the_local_wrapper(home: Home) -> None:
    """A key file on the same machine is for one machine's owner."""
    with pytest.raises(SetupError, match="production"):
        opened(home, production=True)


def test_a_second_process_is_refused(home: Home) -> None:
    """One process per home: the second does not even begin."""
    with home.locked():
        with pytest.raises(SetupError, match="another key service"):
            init(home, utc_now, os.urandom)
        result = CliRunner().invoke(cli, ["serve", "--home", str(home.path), "--port", "0"])
    assert isinstance(result.exception, SetupError)


def test_a_home_that_was_never_set_up_is_refused_with_the_command_to_run(tmp_path: Path) -> None:
    """The message carries the remedy."""
    with pytest.raises(SetupError, match="anamorph-keysvc init"):
        opened(Home(tmp_path))


def test_a_database_of_another_release_is_refused(home: Home) -> None:
    """Neither older nor newer schemas are served."""
    service = opened(home)
    with service.database.write(PLATFORM) as session:
        session.connection().exec_driver_sql("UPDATE alembic_version SET version_num = '0001'")
    service.database.close()
    with pytest.raises(SetupError, match="0001"):
        opened(home)


def test_the_public_keys_of_checkpoints_are_printed_for_those_who_verify(home: Home) -> None:
    """What signs stays in its file; what verifies is printed, and nothing before there is a signer."""
    command = [sys.executable, "-m", "anamorph_keysvc.main", "checkpoint-keys", "--home", str(home.path)]
    before = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (before.returncode, before.stdout) == (1, "")
    signer = LocalSigner.open(home.path / FILE_NAME, os.urandom)
    after = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert read_public_keys(after.stdout) == signer.public_keys()
