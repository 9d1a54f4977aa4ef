"""Two processes of the production service, fault proxies before their servers, and calls to them."""

from __future__ import annotations

import signal
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil
from tests.keysvc.faults.calls import Outcome, ask, until
from tests.keysvc.faults.tokens import living_tokens

from anamorph.wire.admin import (
    Activation,
    ApiKeyCreate,
    Materialized,
    ModelCreate,
    Probe,
    Role,
    RotationPolicy,
    TenantCreate,
)
from anamorph.wire.keyservice import KeyService

if TYPE_CHECKING:
    from tests.servers.postgres import PostgresServer
    from tests.servers.production import KeyServiceProcess, Production
    from tests.servers.proxies import Fault
    from tests.servers.vault import VaultServer

MODEL = "chat"
ARTIFACT = Materialized(replica="r", manifest_sha256="0" * 64, probe=Probe(prompts=((1,),), expected=((2,),)))
POLICY = RotationPolicy(
    grace_s=4, client_cache_ttl_s=1, longest_request_s=1, clock_skew_s=1, propagation_s=1, destroy_delay_s=0
)
# Tests make more requests in a minute than a tenant is usually granted.
LIMITS = "\n".join(
    f"{kind}_per_minute = 1000000" for kind in ("reads", "writes", "releases", "rotations", "failed_logins")
)


@dataclass(frozen=True)
class Held:
    """What the two processes hold; sockets of the pools apart, of which there are now more, now fewer."""

    threads: int
    to_database: int
    to_vault: int
    other_descriptors: int
    server_side: int
    """Connections as PostgreSQL counts them."""
    tokens: int


@dataclass
class Site:
    """The whole: ``database`` and ``kms`` are the ports that both processes go through."""

    production: Production
    database: Fault
    kms: Fault
    processes: dict[str, KeyServiceProcess] = field(default_factory=dict)
    tenants: int = 0

    @property
    def vault(self) -> VaultServer:
        return self.production.vault

    @property
    def postgres(self) -> PostgresServer:
        return self.production.postgres

    @property
    def first(self) -> KeyServiceProcess:
        return self.processes["first"]

    @property
    def second(self) -> KeyServiceProcess:
        return self.processes["second"]

    @property
    def settings(self) -> str:
        """Receivers of webhooks may be on this machine, with a certificate of Vault's authority."""
        trusted = f'ca_file = "{self.vault.ca_file}"'
        return f'{LIMITS}\n[webhooks]\nallow_private = ["127.0.0.0/8"]\n{trusted}'

    def configure(self, name: str) -> None:
        """Write a process' configuration anew, with fresh secret ids."""
        self.production.config(name, **self._where)

    def start(self, name: str) -> None:
        """Start a process, or start it anew where it was: its port stays, its secret ids are fresh."""
        known = self.processes.get(name)
        if known is None:
            self.processes[name] = self.production.process(name, **self._where)
            return
        self.configure(name)
        known.start()

    @property
    def _where(self) -> dict[str, Any]:
        url = f"https://127.0.0.1:{self.kms.port}"
        return {"postgres_port": self.database.port, "vault_url": url, "limits": self.settings}

    def kill(self, *names: str) -> None:
        """kill -9, all at once."""
        for name in names:
            psutil.Process(self.processes[name].program.pid).kill()
        for name in names:
            self.processes[name].program.stop(signal.SIGKILL)

    def owner(self) -> Owner:
        """A new tenant with one model."""
        self.tenants += 1
        return Owner.create(self, f"t{self.tenants}")

    def platform(self, process: KeyServiceProcess | None = None) -> KeyService:
        return self.production.platform(process or self.second)

    def heal(self) -> None:
        """No fault left, Vault unsealed."""
        self.database.heal()
        self.kms.heal()
        self.vault.unseal()

    def held(self) -> Held:
        """What the processes hold just now."""
        running = [psutil.Process(process.program.pid) for process in self.processes.values()]
        ports = Counter(
            link.raddr.port
            for process in running
            for link in process.net_connections(kind="tcp")
            if link.raddr and link.raddr.port in {self.database.port, self.kms.port}
        )
        return Held(
            threads=sum(process.num_threads() for process in running),
            to_database=ports[self.database.port],
            to_vault=ports[self.kms.port],
            other_descriptors=sum(process.num_fds() for process in running) - ports.total(),
            server_side=self.postgres.connections(self.production.database),
            tokens=sum(living_tokens(self.vault).values()),
        )


@dataclass
class Owner:
    """A tenant: what its administrator, its client and the platform do."""

    site: Site
    tenant: str
    admin: str = field(repr=False)
    client: str = field(repr=False)

    @classmethod
    def create(cls, site: Site, tenant: str) -> Owner:
        with site.platform() as platform:
            platform.create_tenant(TenantCreate(id=tenant))
            keys = [
                platform.create_api_key(tenant, ApiKeyCreate(name=role.value, role=role)).secret
                for role in (Role.ADMIN, Role.CLIENT)
            ]
        owner = cls(site, tenant, *keys)
        with KeyService(site.second.url, owner.admin) as admin:
            admin.create_model(
                tenant, ModelCreate(id=MODEL, base="b", vocab_size=50, context_length=64, policy=POLICY)
            )
        return owner

    @property
    def at(self) -> tuple[str, str]:
        return self.tenant, MODEL

    @property
    def keys_path(self) -> str:
        return f"/v1/tenants/{self.tenant}/models/{MODEL}/keys"

    def keys(self, process: KeyServiceProcess | None = None) -> KeyService:
        """Calls as the tenant's administrator."""
        return KeyService((process or self.site.second).url, self.admin)

    def rotate(self) -> int:
        """A new version that has its key."""
        with self.keys() as keys:
            number = keys.rotate(*self.at).version
            until(lambda: keys.get_version(*self.at, number).key_id is not None)
        return number

    def stage(self, version: int) -> bytes:
        """Carry a prepared version to STAGED; the root that its job read."""
        with self.site.platform() as platform:
            grant = platform.materialize(*self.at, version)
        with KeyService(self.site.second.url, grant.secret) as job:
            root = job.release(*self.at, version, "materialize").material()
            job.stage(*self.at, version, ARTIFACT)
        return root

    def activate(self, version: int) -> None:
        with self.site.platform() as platform:
            platform.activate(*self.at, version, Activation(endpoint="http://e"))

    def active(self) -> int:
        """A new version in service."""
        version = self.rotate()
        self.stage(version)
        self.activate(version)
        return version

    def release(self, process: KeyServiceProcess, version: int) -> Outcome:
        """What a client is answered; unsealed, since only the answer's kind is looked at."""
        return ask(process, "POST", f"{self.keys_path}/{version}:release", self.client, {"purpose": "client"})

    def act(self, process: KeyServiceProcess, version: int, action: str) -> Outcome:
        return ask(process, "POST", f"{self.keys_path}/{version}:{action}", self.admin)
