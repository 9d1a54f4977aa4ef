"""The key service as a security team runs it: PostgreSQL, Vault, processes set up by their own commands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
from tests.servers.process import Program, free_port

from anamorph.wire.keyservice import KeyService

if TYPE_CHECKING:
    from tests.servers.postgres import PostgresServer
    from tests.servers.vault import VaultServer

IDENTITIES = ("issuer", "releaser", "shredder")


@dataclass
class KeyServiceProcess:
    """One process of the service; ``config`` is its own, since a wrapped secret id opens once."""

    config: Path
    port: int = field(default_factory=free_port)
    program: Program = field(init=False)

    def __post_init__(self) -> None:
        command = [sys.executable, "-m", "anamorph_keysvc.main", "serve", "--config", str(self.config)]
        self.program = Program([*command, "--port", str(self.port)], self.config.with_suffix(".log"))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.program.start(self._answers)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/livez", trust_env=False, timeout=5).status_code == 200
        except httpx.TransportError:
            return False


@dataclass
class Production:
    """One database and one Vault, and as many processes of the service as a test asks for.

    ``postgres_port`` and ``vault_url`` may be those of a proxy before the real servers.
    """

    folder: Path
    postgres: PostgresServer
    vault: VaultServer
    database: str
    started: list[KeyServiceProcess] = field(default_factory=list)

    @property
    def platform_key_file(self) -> Path:
        return self.folder / "platform.key"

    def config(self, name: str, *, postgres_port: int = 0, vault_url: str = "", limits: str = "") -> Path:
        """Write a configuration, and freshly wrapped secret ids for it."""
        dsn = self.postgres.dsn(self.database, "anamorph_service", port=postgres_port or None)
        lines = [
            f'database = "{dsn}"',
            f'platform_key_file = "{self.platform_key_file}"',
            *(["[limits]", limits] if limits else []),
            "[audit]",
            f'destination = "{self.folder / "checkpoints"}"',
            "interval_s = 1",
            "[vault]",
            *self._vault(vault_url or self.vault.url),
        ]
        for identity in IDENTITIES:
            secret = self.folder / f"{name}-{identity}.wrapped"
            secret.write_text(self._wrapped(identity))
            lines += [
                f"[vault.{identity}]",
                'method = "approle"',
                f'role_id = "role-id-of-{identity}"',
                f'wrapped_secret_id_file = "{secret}"',
            ]
        path = self.folder / f"{name}.toml"
        path.write_text("\n".join(lines) + "\n")
        return path

    def process(self, name: str, **where: Any) -> KeyServiceProcess:
        """A process of the service, started and ready."""
        process = KeyServiceProcess(self.config(name, **where))
        self.started.append(process)
        process.start()
        return process

    def platform(self, process: KeyServiceProcess) -> KeyService:
        return KeyService(process.url, self.platform_key_file.read_text().strip())

    def command(self, *arguments: str) -> str:
        """What ``anamorph-keysvc`` prints; AssertionError with its words where it refuses."""
        passwords = self.folder / "pgpass"
        address = urlsplit(self.postgres.dsn(self.database))
        passwords.write_text(f"*:*:*:{address.username}:{address.password}\n")
        passwords.chmod(0o600)
        done = subprocess.run(
            [sys.executable, "-m", "anamorph_keysvc.main", *arguments],
            capture_output=True,
            text=True,
            env=os.environ | {"PGPASSFILE": str(passwords)},
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def url(self, user: str) -> str:
        """For ``anamorph-keysvc database``: without a password."""
        return self.postgres.dsn(self.database, user).replace(f":{self.postgres.password}@", "@")

    def set_up(self) -> None:
        """What the operations manual says, in its order."""
        superuser = urlsplit(self.postgres.dsn(self.database)).username or ""
        self.command("database", "setup", "--url", self.url(superuser))
        self.command("database", "upgrade", "--url", self.url("anamorph_migrator"))
        settings, token = self.folder / "vault.toml", self.folder / "root.token"
        lines = self._vault(self.vault.url)
        for identity in IDENTITIES:
            lines += [
                f"[{identity}]",
                'method = "approle"',
                f'role_id = "role-id-of-{identity}"',
                f'wrapped_secret_id_file = "{self.folder / "unused"}"',
            ]
        settings.write_text("\n".join(lines) + "\n")
        token.write_text(self.vault.root_token)
        token.chmod(0o600)
        self.command("vault", "setup", "--settings", str(settings), "--token-file", str(token))
        self.command("init", "--config", str(self.config("init")))

    def _vault(self, url: str) -> list[str]:
        return [f'address = "{url}"', f'ca_file = "{self.vault.ca_file}"']

    def _wrapped(self, identity: str) -> str:
        path = f"auth/approle/role/anamorph-{identity}/secret-id"
        answer = self.vault.ask("POST", path, headers={"X-Vault-Wrap-TTL": "600s"})
        return str(answer["wrap_info"]["token"])


@contextmanager
def running_production(folder: Path, postgres: PostgresServer, vault: VaultServer) -> Iterator[Production]:
    """Set up, no process started yet; what was started is stopped at the end."""
    with ExitStack() as ends:
        made = Production(folder, postgres, vault, ends.enter_context(postgres.fresh()))
        made.set_up()
        try:
            yield made
        finally:
            for process in made.started:
                process.program.stop()
