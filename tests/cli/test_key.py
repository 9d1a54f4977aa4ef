"""``anamorph key``: makes keys, shows what is public, never anything else."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from anamorph.keys import TenantKey

Run = Callable[..., CompletedProcess[str]]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key.json"
    TenantKey.from_root(bytes(range(32)), "acme", "chat", 3).save(path)
    return path


def test_a_generated_key_is_private_and_can_be_loaded(anamorph: Run, tmp_path: Path) -> None:
    """The file is 0600 and holds the key whose id was printed."""
    path = tmp_path / "new.json"
    done = anamorph("key", "generate", "acme", "chat", 3, "--out", path, "--json")
    assert done.returncode == 0
    key = TenantKey.load(path)
    assert json.loads(done.stdout)["key_id"] == key.id
    assert key.id.startswith("acme.chat.v3.")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_key_is_never_overwritten(anamorph: Run, key_file: Path) -> None:
    """One line of error, exit code 1, and the file as it was."""
    before = key_file.read_bytes()
    done = anamorph("key", "generate", "acme", "chat", 3, "--out", key_file)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert key_file.read_bytes() == before


def test_showing_a_key_shows_nothing_secret(anamorph: Run, key_file: Path) -> None:
    """Neither the root nor a subkey is printed, in any common spelling."""
    key = TenantKey.load(key_file)
    done = anamorph("key", "show", key_file)
    assert key.id in done.stdout
    for secret in (bytes(range(32)), key.subkey("vocab"), key.subkey("manifest")):
        assert secret.hex() not in done.stdout.lower()
        assert secret.hex()[:16] not in done.stdout.lower()


@pytest.mark.parametrize("arguments", [("Acme", "chat", 1), ("acme", "a.b", 1), ("acme", "chat", 0)])
def test_a_bad_id_is_one_line_of_error(anamorph: Run, tmp_path: Path, arguments: tuple[object, ...]) -> None:
    """Ids and versions outside the grammar make no file."""
    done = anamorph("key", "generate", *arguments, "--out", tmp_path / "k")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_one_line_of_error(anamorph: Run, tmp_path: Path) -> None:
    """No traceback for what a user can mistype."""
    done = anamorph("key", "show", tmp_path / "none.json")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
