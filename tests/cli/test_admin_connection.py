"""How admin commands find the key service and its credential, and what they refuse to do with either."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from anamorph.cli.admin import read_api_key
from anamorph.cli.machine.home import Home, SystemState
from anamorph.errors import SetupError

Run = Callable[..., CompletedProcess[str]]

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "api.key"
    path.touch(0o600)
    path.write_text("amk_secret-of-the-tenant\n")
    return path


def refused(done: CompletedProcess[str], says: str, code: int = 1) -> None:
    assert (done.returncode, done.stdout) == (code, "")
    assert says in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert "secret-of-the-tenant" not in done.stderr


def test_without_a_service_the_ways_to_one_are_named(anamorph: Run, tmp_path: Path) -> None:
    """Options, variables, or `anamorph up`."""
    done = anamorph("tenant", "list", "--home", tmp_path / "none")
    refused(done, "--keysvc and --api-key-file")
    refused(done, "anamorph up")


def test_a_service_that_is_not_there_is_one_line(anamorph: Run, key_file: Path) -> None:
    """With what to check next."""
    done = anamorph("tenant", "list", "--keysvc", NOWHERE, "--api-key-file", key_file)
    refused(done, "anamorph status")
    assert done.stderr.count("\n") == 1


def test_a_url_without_a_key_is_refused(anamorph: Run) -> None:
    """The keys in a home are never sent to another service."""
    refused(anamorph("tenant", "list", "--keysvc", NOWHERE), "--keysvc needs --api-key-file")


@pytest.mark.parametrize(
    "url", ["ftp://x", "keys.example:8400", "http://user:secret-of-the-tenant@x", "http://"]
)
def test_a_strange_url_is_refused(anamorph: Run, key_file: Path, url: str) -> None:
    """Only http and https, and no credentials in it."""
    done = anamorph("tenant", "list", "--keysvc", url, "--api-key-file", key_file)
    refused(done, "--keysvc is a URL such as")


def test_a_key_is_no_argument(anamorph: Run) -> None:
    """There is no option that takes the key itself."""
    done = anamorph("tenant", "list", "--keysvc", NOWHERE, "--api-key", "amk_secret-of-the-tenant")
    refused(done, "No such option", 2)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_key_file_that_is_open_to_others_is_refused(key_file: Path, mode: int) -> None:
    """With the command that closes it."""
    key_file.chmod(mode)
    with pytest.raises(SetupError, match=f"chmod 600 {key_file}"):
        read_api_key(key_file)


@pytest.mark.parametrize(
    "content", [b"", b"short\n", b"two words here", b"\xff" * 20, b"x" * 20_000, b"ab\0cdefgh"]
)
def test_what_is_no_api_key_is_refused_and_not_repeated(key_file: Path, content: bytes) -> None:
    """A wrong file is not sent to a service as a credential."""
    key_file.write_bytes(content)
    with pytest.raises(SetupError) as found:
        read_api_key(key_file)
    assert str(found.value) == f"{key_file} holds no API key"


def test_a_token_is_a_credential_too(key_file: Path) -> None:
    """Those of service accounts and OIDC issuers are longer than our keys."""
    key_file.write_bytes(b"eyJ." + b"x" * 5000 + b"\n")
    assert len(read_api_key(key_file)) == 5004


def test_a_key_file_that_is_missing_or_no_file_is_refused(tmp_path: Path) -> None:
    """Missing: how to make one. A FIFO: refused, not waited for."""
    with pytest.raises(SetupError, match="anamorph tenant api-key create"):
        read_api_key(tmp_path / "none")
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(SetupError, match="regular file"):
        read_api_key(tmp_path / "fifo")


@pytest.mark.parametrize("name", ["../acme", "Acme", "a/b", "a%2eb", "*", "é", "x" * 64, "v1"])
def test_a_hostile_id_is_wrong_usage(anamorph: Run, key_file: Path, name: str) -> None:
    """It never becomes part of a URL."""
    done = anamorph("model", "list", name, "--keysvc", NOWHERE, "--api-key-file", key_file)
    refused(done, "an id is 1 to 63", 2) if name != "v1" else refused(done, "reserved", 2)


@pytest.mark.real
def test_the_environment_names_service_and_key(
    anamorph: Run, shell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the options do, which win."""
    monkeypatch.setenv("ANAMORPH_KEYSVC_URL", shell.url)
    monkeypatch.setenv("ANAMORPH_API_KEY_FILE", str(shell.admin_key))
    assert anamorph("model", "list", shell.tenant).returncode == 0
    refused(anamorph("model", "list", shell.tenant, "--keysvc", NOWHERE), "does not answer")


@pytest.mark.real
def test_the_home_of_up_is_used_when_it_is_there(anamorph: Run, shell: Any, tmp_path: Path) -> None:
    """A tenant's commands use its admin's key, the platform's commands the platform's."""
    home = Home(tmp_path / "home")
    home.create()
    home.keysvc.mkdir(0o700)
    home.save(SystemState("x", urls={"keysvc": shell.url}, ready=True))
    for path, key in (
        (home.platform_key, shell.platform_key),
        (home.api_key(shell.tenant, "admin"), shell.admin_key),
    ):
        path.touch(0o600)
        path.write_text(key.read_text())
    assert shell.tenant in anamorph("tenant", "list", "--home", home.root).stdout
    # The platform may not read a tenant's audit log: this is the admin's key.
    assert anamorph("audit-log", "show", shell.tenant, "--home", home.root).returncode == 0


@pytest.mark.real
def test_errors_of_the_service_say_what_to_do(shell: Any, key_file: Path) -> None:
    """A void key, a role that may not, an object that is not there."""
    void = shell("model", "list", shell.tenant, key=key_file, code=1)
    assert "anamorph tenant api-key create" in void.stderr
    assert "secret-of-the-tenant" not in void.stderr
    assert "another role" in shell("tenant", "list", code=1).stderr
    missing = shell("key", "show", shell.tenant, "none", 1, code=1)
    assert f"anamorph key list {shell.tenant} none" in missing.stderr
