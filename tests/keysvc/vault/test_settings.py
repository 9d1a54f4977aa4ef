"""Settings of Vault: files instead of secrets, and what production refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from anamorph.errors import SetupError
from anamorph_keysvc.vault.settings import VaultSettings, load
from anamorph_keysvc.vault.transport import Transport

AUTH = {"method": "jwt", "token_file": "jwt"}
BASE: dict[str, Any] = {
    "address": "https://vault:8200",
    "ca_file": "ca.pem",
    "issuer": AUTH,
    "releaser": AUTH,
    "shredder": AUTH,
}


def test_least_that_must_be_said() -> None:
    """Everything else has a default."""
    settings = VaultSettings.model_validate(BASE)
    assert settings.production
    assert (settings.mount, settings.deadline_s) == ("anamorph-transit", 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"address": "http://vault:8200"},
        {"ca_file": None},
        {"issuer": {"method": "token", "token_file": "t"}},
    ],
)
def test_production_refuses(changes: dict[str, Any]) -> None:
    """What one machine may do."""
    with pytest.raises(ValidationError, match="production"):
        VaultSettings.model_validate(BASE | changes)
    assert VaultSettings.model_validate(BASE | changes | {"production": False})


@pytest.mark.parametrize(
    "changes",
    [
        {"address": "https://user:secret@vault"},
        {"address": "https://vault/v1"},
        {"address": "ftp://vault"},
        {"mount": "../sys"},
        {"mount": "a//b"},
        {"namespace": "a/%2e"},
        {"token": "s.secret"},
        {"issuer": AUTH | {"token": "s.secret"}},
        {"issuer": {"method": "approle", "role_id": "r", "secret_id": "secret"}},
        {"deadline_s": 0},
    ],
)
def test_refused(changes: dict[str, Any]) -> None:
    """Secrets among the settings, paths that lead elsewhere, deadlines that never end."""
    with pytest.raises(ValidationError):
        VaultSettings.model_validate(BASE | changes)


def test_file(tmp_path: Path) -> None:
    """TOML; what is given besides takes precedence."""
    file = tmp_path / "vault.toml"
    auth = '{method = "jwt", token_file = "jwt"}'
    lines = [f"{name} = {auth}" for name in ("issuer", "releaser", "shredder")]
    file.write_text("\n".join(['address = "http://127.0.0.1:1"', *lines]))
    assert load(file, production=False).issuer.method == "jwt"
    with pytest.raises(SetupError, match="production"):
        load(file)


@pytest.mark.parametrize("content", [None, "no toml", 'address = "https://v"\nsecret = "canary"'])
def test_file_that_does_not_fit(tmp_path: Path, content: str | None) -> None:
    """The message names the file and repeats nothing of it."""
    file = tmp_path / "vault.toml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SetupError, match=r"vault\.toml") as refused:
        load(file)
    assert "canary" not in str(refused.value)


def test_missing_authority(tmp_path: Path) -> None:
    """Said at the start, not with the first call."""
    settings = VaultSettings.model_validate(BASE | {"ca_file": tmp_path / "none.pem"})
    with pytest.raises(SetupError, match=r"none\.pem"):
        Transport(settings)
