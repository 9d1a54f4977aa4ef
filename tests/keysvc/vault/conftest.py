"""The key service's three identities at a real Vault, each logged in with a wrapped secret id."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from anamorph_keysvc.roots import RootCache
from anamorph_keysvc.service import tokens
from anamorph_keysvc.signing import SigningKeys
from anamorph_keysvc.vault.admin import Admin
from anamorph_keysvc.vault.auth import Vault
from anamorph_keysvc.vault.settings import Identity, VaultSettings
from anamorph_keysvc.vault.setup import setup
from anamorph_keysvc.vault.transport import Transport
from anamorph_keysvc.vault.wrapper import VaultTransitWrapper

if TYPE_CHECKING:
    from tests.keysvc.conftest import World
    from tests.servers.vault import VaultServer

    OnVault: TypeAlias = Callable[[World], World]


@dataclass
class Counted:
    """Counts what is asked of Vault."""

    seen: Counter[tuple[str, str]] = field(default_factory=Counter)

    def observe(self, kind: str, outcome: str) -> None:
        self.seen[kind, outcome] += 1

    def of(self, kind: str) -> int:
        return sum(count for (seen, _), count in self.seen.items() if seen == kind)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Place:
    """A server that is set up, and how to open it as the key service does."""

    server: VaultServer
    folder: Path
    opened: list[Vault] = field(default_factory=list)

    def settings(self, **changes: Any) -> VaultSettings:
        auth = {
            identity.value: {
                "method": "approle",
                "role_id": f"role-id-of-{identity.value}",
                "wrapped_secret_id_file": self.secret_file(identity),
            }
            for identity in Identity
        }
        base = {"address": self.server.url, "ca_file": self.server.ca_file, **auth}
        return VaultSettings.model_validate(base | changes)

    def secret_file(self, identity: Identity) -> Path:
        return self.folder / f"{identity.value}.wrapped"

    def wrap_secret_id(self, identity: Identity) -> str:
        """Write a freshly wrapped secret id where the settings look for it."""
        path = f"auth/approle/role/{identity.policy}/secret-id"
        headers = {"X-Vault-Wrap-TTL": "300s"}
        token = self.server.ask("POST", path, headers=headers)["wrap_info"]["token"]
        self.secret_file(identity).write_text(f"{token}\n")
        return str(token)

    def open(self, counted: Counted | None = None, clock: Clock | None = None, **changes: Any) -> Vault:
        """All three identities; tokens are revoked after the test."""
        for identity in Identity:
            self.wrap_secret_id(identity)
        self.opened.append(Vault.open(self.settings(**changes), counted, clock=clock or time.monotonic))
        return self.opened[-1]

    def close(self) -> None:
        while self.opened:
            self.opened.pop().close()


@pytest.fixture(scope="session")
def make_place() -> Callable[..., Place]:
    return Place


@pytest.fixture(scope="session")
def prepared(vault_server: VaultServer, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The shared server after ``vault setup``."""
    place = Place(vault_server, tmp_path_factory.mktemp("identities"))
    transport = Transport(place.settings())
    setup(Admin(transport, vault_server.root_token), place.settings())
    transport.close()
    return place


@pytest.fixture
def place(prepared: Place) -> Iterator[Place]:
    yield prepared
    prepared.close()


@pytest.fixture
def counted() -> Counted:
    return Counted()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def vault(place: Place, counted: Counted) -> Vault:
    return place.open(counted)


@pytest.fixture
def wrapper(vault: Vault) -> VaultTransitWrapper:
    return VaultTransitWrapper(vault)


@pytest.fixture
def on_vault(wrapper: VaultTransitWrapper) -> OnVault:
    """Turns a world into one whose every secret is Vault's, and whose every root is opened each time."""

    def turned(world: World) -> World:
        world.service = replace(
            world.service, wrapper=wrapper, roots=RootCache(most=1, longest_s=0), signing=SigningKeys()
        )
        world.sql("DELETE FROM signing_key")  # under the key file, where it was made
        tokens.ensure_signing_key(world.service)
        return world

    return turned


@pytest.fixture
def kek() -> str:
    """A KEK's name that no other test uses."""
    return f"kek-{secrets.token_hex(8)}"


@pytest.fixture
def token_of(vault: Vault) -> Callable[[Identity], str]:
    """The token that an identity uses now, for calls that its class would never make."""

    def token(identity: Identity) -> str:
        caller = getattr(vault, identity.value)
        caller.ready()
        return str(caller._held.granted.token)

    return token
