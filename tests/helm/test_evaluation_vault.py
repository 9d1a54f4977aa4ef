"""The evaluation profile's Vault: initialised, unsealed and set up by its sidecar, with real servers."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from kubernetes import client
from tests.helm.scripts import script
from tests.servers.kube import ApiServer, running_apiserver
from tests.servers.process import free_port
from tests.servers.vault import CONFIG, HOST, VaultServer, certify

from anamorph_keysvc.vault.admin import Admin
from anamorph_keysvc.vault.settings import Approle, VaultSettings
from anamorph_keysvc.vault.setup import setup
from anamorph_keysvc.vault.transport import Transport

pytestmark = [pytest.mark.real, pytest.mark.slow]

SECRET = "anamorph-vault-unseal"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with running_apiserver(tmp_path_factory.mktemp("kubernetes")) as server:
        yield server


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[VaultServer]:
    """A server that nobody has initialised."""
    server = VaultServer(tmp_path)
    certify(tmp_path)
    (tmp_path / "data").mkdir()
    certificate, key = server.certificate
    values = {"data": tmp_path / "data", "certificate": certificate, "key": key, "port": server.port}
    (tmp_path / "vault.hcl").write_text(CONFIG.format(host=HOST, cluster_port=free_port(), **values))
    server.start()
    try:
        yield server
    finally:
        server.stop()


@dataclass
class Kept:
    """An unsealer that has not begun, its Secret, and the tokens that it was given to set Vault up with."""

    unsealer: Any
    secrets: client.CoreV1Api
    namespace: str
    tokens: list[str]

    def settle(self) -> None:
        for _ in range(300):
            try:
                if self.unsealer.turn():
                    return
            except httpx.HTTPStatusError:
                continue
        raise AssertionError("Vault is not set up")

    @property
    def key(self) -> str:
        data = self.secrets.read_namespaced_secret(SECRET, self.namespace).data
        return base64.b64decode(data["unseal-key"]).decode()


@pytest.fixture
def kept(cluster: ApiServer, vault: VaultServer, request: pytest.FixtureRequest) -> Iterator[Kept]:
    core, namespace = client.CoreV1Api(cluster.admin), f"n{abs(hash(request.node.name)) % 10**8}"
    core.create_namespace({"metadata": {"name": namespace}})
    core.create_namespaced_secret(namespace, {"metadata": {"name": SECRET}})
    logins = {
        one: Approle(role_id=one, wrapped_secret_id_file=Path("/none"))
        for one in ("issuer", "releaser", "shredder")
    }
    settings = VaultSettings(address=vault.url, ca_file=vault.ca_file, **logins)
    tokens: list[str] = []

    def set_up(token: str) -> None:
        tokens.append(token)
        transport = Transport(settings)
        try:
            setup(Admin(transport, token), settings)
        finally:
            transport.close()

    with vault.client("") as http:
        http.base_url = httpx.URL(vault.url)
        http.headers.pop("X-Vault-Token", None)
        unsealer = script("evaluation_unseal").Unsealer(http, core, namespace, SECRET, set_up)
        yield Kept(unsealer, core, namespace, tokens)


def status_of(vault: VaultServer, token: str) -> int:
    with vault.client(token) as http:
        return http.get("auth/token/lookup-self").status_code


def test_a_new_vault_is_initialised_and_set_up(kept: Kept, vault: VaultServer) -> None:
    """The key is in the Secret, the transit mount is there, and the root token is worth nothing any more."""
    kept.settle()
    assert vault.active()
    assert len(base64.b64decode(kept.key)) == 32
    [token] = kept.tokens
    assert status_of(vault, token) == 403


def test_a_restarted_vault_is_opened_again(kept: Kept, vault: VaultServer) -> None:
    """By the same key; it is set up again with a token of its own, which is revoked as well."""
    kept.settle()
    key = kept.key
    vault.stop()
    vault.start()
    again = script("evaluation_unseal").Unsealer(
        kept.unsealer.vault, kept.secrets, kept.namespace, SECRET, kept.unsealer.set_up
    )
    kept.unsealer = again
    kept.settle()
    assert kept.key == key
    first, second = kept.tokens
    assert first != second
    assert status_of(vault, second) == 403
