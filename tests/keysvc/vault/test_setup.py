"""``vault setup`` on a fresh server, and that ``vault check`` finds each thing that is wrong with one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tests.servers.vault import VaultServer, running_vault
from typer.testing import CliRunner

from anamorph import errors
from anamorph_keysvc.vault.admin import Admin
from anamorph_keysvc.vault.auth import Vault
from anamorph_keysvc.vault.check import check
from anamorph_keysvc.vault.commands import vault_cli
from anamorph_keysvc.vault.policies import CHECKER_POLICY
from anamorph_keysvc.vault.settings import Identity, VaultSettings
from anamorph_keysvc.vault.setup import Done, setup
from anamorph_keysvc.vault.transport import Transport

if TYPE_CHECKING:
    from tests.keysvc.vault.conftest import Place

pytestmark = [pytest.mark.real, pytest.mark.slow]
MOUNT = "anamorph-transit"
KEYS = f"{MOUNT}/keys"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VaultServer]:
    """A server of this module's own, which keeps no log and holds nothing."""
    with running_vault(tmp_path_factory.mktemp("bare"), audit=False) as server:
        yield server


@pytest.fixture
def home(bare: VaultServer, tmp_path: Path, make_place: Callable[..., Place]) -> Iterator[Place]:
    """The server set up, with whatever an earlier test did to it put right again."""
    place = make_place(bare, tmp_path)
    run_setup(place, settings_of(place))
    yield place
    place.close()


def settings_of(place: Place, **changes: Any) -> VaultSettings:
    return place.settings(setup={"audit_files": [str(place.server.audit_log)]} | changes)


def run_setup(place: Place, settings: VaultSettings, token: str | None = None) -> list[Done]:
    transport = Transport(settings)
    try:
        return setup(Admin(transport, token or place.server.root_token), settings)
    finally:
        transport.close()


def wrong(place: Place, vault: Vault | None = None, token: str | None = None) -> dict[str, str]:
    """What ``check`` finds to be wrong."""
    vault = vault or place.open()
    found = check(vault, Admin(vault.transport, token or place.server.root_token))
    assert {item.outcome for item in found} <= {"ok", "wrong"}
    return {item.what: item.detail for item in found if item.outcome == "wrong"}


def test_setup_of_a_fresh_server(bare: VaultServer, tmp_path: Path, make_place: Callable[..., Place]) -> None:
    """Everything is made, a second run changes nothing, and the check finds nothing wrong."""
    place = make_place(bare, tmp_path)
    done = run_setup(place, settings_of(place))
    assert len(done) > 10
    assert {item.changed for item in done} == {True}
    again = run_setup(place, settings_of(place))
    assert [item.what for item in again if item.changed] == []
    assert wrong(place) == {}
    place.close()
    assert bare.audit_log.stat().st_size > 0


def test_two_audit_devices(home: Place, tmp_path: Path) -> None:
    """Each file that is named gets a device, once; one that is there stays, and one that goes is missed."""
    files = [str(home.server.audit_log), str(tmp_path / "second.log")]
    settings = settings_of(home, audit_files=files)
    assert [item.what for item in run_setup(home, settings) if item.changed] == [
        f"file audit device {files[1]}"
    ]
    assert not [item.what for item in run_setup(home, settings) if item.changed]
    assert wrong(home, home.open(setup={"audit_files": files})) == {}
    assert Path(files[1]).stat().st_size > 0
    home.server.ask("DELETE", "sys/audit/anamorph-2")
    found = wrong(home, home.open(setup={"audit_files": files}))
    assert list(found) == ["audit device"]
    assert f"none writes to {files[1]}" in found["audit device"]


def test_kubernetes_and_jwt_are_set_up_once(home: Place, tmp_path: Path) -> None:
    """Their configuration and roles, too, are recognised when they are there."""
    settings = other_methods(home, tmp_path, ec.generate_private_key(ec.SECP256R1()))
    assert any(item.changed for item in run_setup(home, settings))
    assert not [item.what for item in run_setup(home, settings) if item.changed]


def other_methods(place: Place, folder: Path, key: ec.EllipticCurvePrivateKey) -> VaultSettings:
    public = folder / "public.pem"
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))
    cluster = {
        "host": "https://10.0.0.1",
        "ca_file": place.server.ca_file,
        "service_accounts": ["keysvc"],
        "namespaces": ["anamorph"],
    }
    provider = {"public_keys": [public], "issuer": "https://id", "audience": "vault", "subject": "keysvc"}
    return VaultSettings.model_validate(
        {
            **place.settings().model_dump(),
            "issuer": {"method": "kubernetes"},
            "releaser": {"method": "jwt", "token_file": folder / "jwt"},
            "setup": {"kubernetes": cluster, "jwt": provider},
        }
    )


def test_login_by_jwt(home: Place, tmp_path: Path) -> None:
    """A token of the identity provider is exchanged for one of Vault."""
    key = ec.generate_private_key(ec.SECP256R1())
    settings = other_methods(home, tmp_path, key)
    run_setup(home, settings)
    claims = {
        "iss": "https://id",
        "aud": "vault",
        "sub": "keysvc",
        "iat": int(time.time()),
        "exp": 4_000_000_000,
    }
    (tmp_path / "jwt").write_text(jwt.encode(claims, key, "ES256"))
    vault = Vault.open(settings)
    vault.releaser.ready()
    (tmp_path / "jwt").write_text(jwt.encode(claims | {"sub": "another"}, key, "ES256"))
    vault.close()
    with pytest.raises(errors.Unavailable) as refused:
        vault.releaser.ready()
    assert refused.value.code == "kms_denied"
    vault.close()


def test_setup_corrects_what_was_changed(home: Place) -> None:
    """A widened policy, a role without an end to its tokens, upserts: put right and named."""
    ask = home.server.ask
    ask("POST", f"{MOUNT}/config/keys", {"disable_upsert": False})
    ask("PUT", "sys/policies/acl/anamorph-releaser", {"policy": 'path "*" { capabilities = ["read"] }'})
    ask("POST", "auth/approle/role/anamorph-issuer", {"token_ttl": 0, "token_policies": ["root-like"]})
    changed = [item.what for item in run_setup(home, settings_of(home)) if item.changed]
    assert changed == [
        "no keys by encrypting",
        "policy anamorph-releaser",
        "role auth/approle/role/anamorph-issuer",
    ]
    assert wrong(home) == {}


def test_setup_refuses_a_key_it_did_not_make(home: Place) -> None:
    """A platform KEK that can be exported is not taken over in silence."""
    home.server.ask("POST", f"{KEYS}/platform/config", {"exportable": True})
    try:
        with pytest.raises(errors.SetupError, match="exportable is True"):
            run_setup(home, settings_of(home))
        assert "key platform" in wrong(home)
    finally:
        remove_key(home, "platform")


def test_setup_refuses_another_engines_mount(home: Place) -> None:
    """A mount of another kind has our name."""
    with pytest.raises(errors.SetupError, match="type cubbyhole"):
        run_setup(home, home.settings(mount="cubbyhole"))


def test_setup_without_rights_says_what_vault_refused(home: Place) -> None:
    """A token that may do nothing."""
    token = home.server.ask("POST", "auth/token/create", {"policies": ["none"]})["auth"]["client_token"]
    with pytest.raises(errors.SetupError, match=r"sys/audit with status 403: .*permission denied") as refused:
        run_setup(home, settings_of(home), token)
    assert token not in str(refused.value)


def test_namespace_that_is_not_in_force(home: Place) -> None:
    """The community edition ignores namespaces without a word: setup stops, and check says so."""
    settings = home.settings(namespace="team-a")
    with pytest.raises(errors.SetupError, match="ignores namespaces"):
        run_setup(home, settings)
    assert "ignores namespaces" in wrong(home, home.open(namespace="team-a"))["namespace team-a"]


def widen(policy: str, rule: str) -> Callable[[Place], None]:
    def seed(place: Place) -> None:
        path = f"sys/policies/acl/{policy}"
        text = place.server.ask("GET", path)["data"]["policy"]
        place.server.ask("PUT", path, {"policy": f"{text}\n{rule}"})

    return seed


def post(path: str, body: dict[str, Any]) -> Callable[[Place], None]:
    return lambda place: place.server.ask("POST", path, body)


def delete(path: str) -> Callable[[Place], None]:
    return lambda place: place.server.ask("DELETE", path)


DECRYPTS = f'path "{MOUNT}/decrypt/*" {{ capabilities = ["update"] }}'
CONFIGURES = f'path "{MOUNT}/keys/*" {{ capabilities = ["update"] }}'
ANY_FLOOR = f'path "{MOUNT}/keys/platform/config" {{ capabilities = ["update"] }}'
MINTS = 'path "auth/token/create" { capabilities = ["update"] }'
ROLE = "auth/approle/role/anamorph-"
DEFECTS: dict[str, tuple[Callable[[Place], None], set[str]]] = {
    "issuer decrypts": (
        widen("anamorph-issuer", DECRYPTS),
        {"policy anamorph-issuer", "issuer: capabilities", "issuer: refused calls"},
    ),
    "keys/* instead of keys/+": (
        widen("anamorph-issuer", CONFIGURES),
        {"policy anamorph-issuer", "issuer: capabilities", "issuer: refused calls"},
    ),
    "any parameter for one key": (
        widen("anamorph-shredder", ANY_FLOOR),
        {"policy anamorph-shredder", "shredder: refused calls"},
    ),
    "releaser makes tokens": (
        widen("anamorph-releaser", MINTS),
        {"policy anamorph-releaser", "releaser: capabilities"},
    ),
    "policy gone": (
        delete("sys/policies/acl/anamorph-shredder"),
        {"policy anamorph-shredder", "shredder: login"},
    ),
    "second policy": (
        post(f"{ROLE}issuer", {"token_policies": ["anamorph-issuer", "anamorph-releaser"]}),
        {
            "role auth/approle/role/anamorph-issuer",
            "issuer: token",
            "issuer: capabilities",
            "issuer: refused calls",
        },
    ),
    "default policy": (
        post(f"{ROLE}releaser", {"token_no_default_policy": False}),
        {"role auth/approle/role/anamorph-releaser", "releaser: token", "releaser: capabilities"},
    ),
    "long tokens": (
        post(f"{ROLE}releaser", {"token_ttl": 80_000}),
        {"role auth/approle/role/anamorph-releaser"},
    ),
    "upserts": (post(f"{MOUNT}/config/keys", {"disable_upsert": False}), {"no keys by encrypting"}),
    "no audit device": (delete("sys/audit/anamorph"), {"audit device"}),
    "exportable KEK": (post(f"{KEYS}/seeded", {"derived": True, "exportable": True}), {"key seeded"}),
    "underived KEK": (post(f"{KEYS}/seeded", {"type": "aes256-gcm96"}), {"key seeded"}),
    "KEK of another type": (post(f"{KEYS}/seeded", {"type": "ed25519"}), {"key seeded"}),
    "KEK with backup": (
        post(f"{KEYS}/seeded", {"derived": True, "allow_plaintext_backup": True}),
        {"key seeded"},
    ),
    "deletable audit key": (
        post(f"{KEYS}/anamorph-audit/config", {"deletion_allowed": True}),
        {"key anamorph-audit"},
    ),
}


@pytest.mark.parametrize(("seed", "expected"), DEFECTS.values(), ids=DEFECTS)
def test_check_finds_what_is_wrong(home: Place, seed: Callable[[Place], None], expected: set[str]) -> None:
    """Each defect by every sign it has, and nothing else."""
    seed(home)
    try:
        assert set(wrong(home)) == expected
    finally:
        remove_key(home, "seeded")
        home.server.ask("POST", f"{KEYS}/anamorph-audit/config", {"deletion_allowed": False})


def test_check_misses_no_key(home: Place) -> None:
    """The platform's KEK and the audit key are needed."""
    remove_key(home, "anamorph-audit")
    assert wrong(home)["key anamorph-audit"].startswith("it is missing")


def test_check_of_a_sealed_server_says_so(home: Place) -> None:
    """No finding, but that nothing can be found out."""
    vault = home.open()
    home.server.seal()
    try:
        with pytest.raises(errors.Unavailable) as sealed:
            check(vault)
        assert sealed.value.code == "kms_sealed"
    finally:
        home.server.unseal()


def test_check_with_the_policy_made_for_it(home: Place) -> None:
    """A token of ``anamorph-checker`` sees enough, and opens nothing."""
    body = {"policies": [CHECKER_POLICY], "no_default_policy": True, "ttl": "10m"}
    token = home.server.ask("POST", "auth/token/create", body)["auth"]["client_token"]
    assert wrong(home, token=token) == {}
    with home.server.client(token) as client:
        assert client.post(f"{MOUNT}/decrypt/platform", json={}).status_code == 403
        assert client.post(f"{MOUNT}/config/keys", json={}).status_code == 403


def test_without_a_token_the_rest_is_not_checked(home: Place) -> None:
    """Left out is not passed."""
    assert check(home.open())[-1].outcome == "not checked"


def remove_key(place: Place, name: str) -> None:
    with place.server.client() as root:
        root.post(f"{KEYS}/{name}/config", json={"deletion_allowed": True})
        root.delete(f"{KEYS}/{name}")


@pytest.fixture
def settings_file(home: Place, tmp_path: Path) -> Path:
    settings = settings_of(home).model_dump(mode="json", exclude_none=True)
    lines = [f"{name} = {toml(value)}" for name, value in settings.items()]
    path = tmp_path / "vault.toml"
    path.write_text("\n".join(lines))
    return path


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml(inner)}" for name, inner in value.items()) + "}"
    return json.dumps(value)


def test_commands(home: Place, tmp_path: Path, settings_file: Path) -> None:
    """Tables for people, JSON for programs, exit code 1 for a defect; the token comes from a file."""
    token = tmp_path / "token"
    token.write_text(home.server.root_token)
    runner, common = CliRunner(), ["--settings", str(settings_file), "--token-file", str(token)]
    result = runner.invoke(vault_cli, ["setup", *common])
    assert result.exit_code == 0, result.output
    assert "policy anamorph-issuer" in result.output
    assert "was there" in result.output
    for identity in Identity:
        home.wrap_secret_id(identity)
    result = runner.invoke(vault_cli, ["check", *common, "--json"])
    assert {item["outcome"] for item in json.loads(result.output)} == {"ok"}
    home.server.ask("DELETE", "sys/audit/anamorph")
    for identity in Identity:
        home.wrap_secret_id(identity)
    result = runner.invoke(vault_cli, ["check", *common])
    assert result.exit_code == 1
    assert "Vault keeps no log" in result.output
    assert home.server.root_token not in result.output


def test_token_is_asked_for(home: Place, settings_file: Path) -> None:
    """Without a file; the answer is not shown, and VAULT_TOKEN is not looked at."""
    environment = {"VAULT_TOKEN": home.server.root_token, "HOME": os.devnull}
    asked = ["setup", "--settings", str(settings_file)]
    assert CliRunner().invoke(vault_cli, asked, input=f"{home.server.root_token}\n").exit_code == 0
    assert CliRunner().invoke(vault_cli, asked, input="none\n", env=environment).exit_code != 0
