"""The running service keeps the contract that it publishes: schemathesis against uvicorn and PostgreSQL.

``ANAMORPH_CONTRACT_EXAMPLES=100`` makes the run longer (examples per operation and of stateful
scenarios; 8 by default), ``ANAMORPH_CONTRACT_SEED`` another one.
"""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import uvicorn
from schemathesis.engine import Status, events, from_schema
from sqlalchemy import create_engine
from tests.servers.postgres import PostgresServer
from tests.servers.process import free_port

from anamorph import telemetry
from anamorph.wire.ids import LABEL
from anamorph_keysvc import homes, reference, roles, schema
from anamorph_keysvc.app import build_app, describe
from anamorph_keysvc.contract import GRANT, ROLES
from anamorph_keysvc.database import Database
from anamorph_keysvc.service import tokens
from anamorph_keysvc.service.work import Service, utc_now
from anamorph_keysvc.settings import Limits
from anamorph_keysvc.webhooks.guard import Guard
from anamorph_keysvc.wrapper import LocalWrapper

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
EXAMPLES = int(os.environ.get("ANAMORPH_CONTRACT_EXAMPLES", "8"))
SEED = int(os.environ.get("ANAMORPH_CONTRACT_SEED", "4"))
# A schema says no more than the form of a request: what a grace must be at least, whether a page
# token is one of ours and whether a rotation is admitted now is said by other 4xx, rightly.
CHECKS = {"positive_data_acceptance": {"enabled": False}}
OFF = {"enabled": False}
WITHOUT_STATES = {"stateful": OFF}
WITHOUT_COVERAGE = {"stateful": OFF, "coverage": OFF}
ONLY_STATES = {"coverage": OFF, "examples": OFF, "fuzzing": OFF, "stateful": {"max-steps": 20}}
SHORT = {"client_cache_ttl_s": 1, "longest_request_s": 1, "clock_skew_s": 0, "propagation_s": 0}
POLICY = {**SHORT, "grace_s": 2, "destroy_delay_s": 0}
MODEL = {"id": "chat", "base": "b", "vocab_size": 50, "context_length": 64, "policy": POLICY}
ARTIFACT = {"replica": "r", "manifest_sha256": "0" * 64, "probe": {"prompts": [[1]], "expected": [[2]]}}
NO_LIMIT = 10_000_000
LIMITS = Limits(
    reads_per_minute=NO_LIMIT,
    writes_per_minute=NO_LIMIT,
    releases_per_minute=NO_LIMIT,
    rotations_per_minute=NO_LIMIT,
    failed_logins_per_minute=NO_LIMIT,
)


@dataclass
class Running:
    """The service at ``url``, as the platform and others may call it."""

    url: str
    platform: str
    admins: dict[str, str] = field(default_factory=dict)

    def call(self, path: str, body: object = None, token: str | None = None) -> dict[str, Any] | None:
        headers = {"Authorization": f"Bearer {token or self.platform}"}
        response = httpx.post(self.url + path, json=body, headers=headers, trust_env=False, timeout=30)
        answer: dict[str, Any] | None = response.json() if response.is_success else None
        return answer

    def admin(self, tenant: str) -> str | None:
        """An administrator's key of a tenant that exists."""
        if tenant not in self.admins:
            made = self.call(f"/v1/tenants/{tenant}/api-keys", {"name": "n", "role": "admin"})
            if made is None:
                return None
            self.admins[tenant] = str(made["secret"])
        return self.admins[tenant]

    def grant(self, tenant: str, model: str, version: int) -> str | None:
        """A new grant of a version that may be materialised now."""
        made = self.call(f"/v1/tenants/{tenant}/models/{model}/keys/{version}:materialize")
        return None if made is None else str(made["secret"])


@dataclass
class Bearer:
    """Chooses a credential that the called operation admits, of the tenant in its path where it has one."""

    running: Running

    def get(self, case: Any, context: Any) -> str | None:
        admitted = context.operation.definition.raw.get(ROLES)
        if admitted is None:
            return None
        path = case.path_parameters or {}
        tenant = path.get("tenant")
        tenant = tenant if isinstance(tenant, str) and re.fullmatch(LABEL, tenant) else "acme"
        wants_root = isinstance(case.body, dict) and case.body.get("purpose") == "materialize"
        if admitted == [GRANT] or (GRANT in admitted and wants_root):
            return self._grant(tenant, path) or self.running.admin("acme")
        if "platform" in admitted:
            return self.running.platform
        return self.running.admin(tenant) or self.running.admin("acme")

    def set(self, case: Any, token: str, _: Any) -> None:
        case.headers = {**(case.headers or {}), "Authorization": f"Bearer {token}"}

    def _grant(self, tenant: str, path: dict[str, Any]) -> str | None:
        model, version = path.get("model"), path.get("version")
        if not (isinstance(model, str) and re.fullmatch(LABEL, model) and isinstance(version, int)):
            return None
        return self.running.grant(tenant, model, version)


@dataclass
class Outcome:
    """What a run has seen; ``failures`` says check, request and message of each."""

    requests: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    stateful: int = 0
    reached: set[str] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)

    def hear(self, event: Any) -> None:
        if isinstance(event, events.ScenarioFinished):
            self._count(event)
        elif isinstance(event, events.NonFatalError | events.FatalError):
            self.failures[f"error {event}"] = repr(getattr(event, "value", None) or vars(event))

    def _count(self, event: events.ScenarioFinished) -> None:
        recorder = event.recorder
        for id_, interaction in recorder.interactions.items():
            self.requests += 1
            self.stateful += recorder.cases[id_].parent_id is not None
            label = recorder.cases[id_].value.operation.label
            if interaction.response is None:
                self.failures[f"no answer: {label}"] = str(interaction.request)
                continue
            self.statuses[interaction.response.status_code] += 1
            if interaction.response.status_code < 300:
                self.reached.add(label)
        for checks in recorder.checks.values():
            for check in checks:
                self.checks[check.name] += 1
                if check.status is not Status.SUCCESS and check.failure_info is not None:
                    failure = check.failure_info.failure
                    text = f"{failure.title}: {failure.message}\n{check.failure_info.code_sample}"
                    self.failures.setdefault(f"{check.name} {failure.operation} {failure.title}", text)

    def report(self) -> str:
        counts = f"{self.requests} requests ({self.stateful} of them follow another by a link)"
        return (
            f"{counts}; statuses {dict(sorted(self.statuses.items()))}; {len(self.reached)} operations done"
        )


@contextmanager
def postgres_database(server: PostgresServer) -> Iterator[Database]:
    """A database of the service's schema, used as its own login role."""
    with server.fresh() as name:
        engine = create_engine(server.url(name))
        with engine.begin() as connection:
            roles.setup(connection)
        engine.dispose()
        engine = create_engine(server.url(name, roles.MIGRATOR))
        schema.upgrade(engine)
        engine.dispose()
        database = Database.postgresql(server.dsn(name, roles.SERVICE))
        try:
            yield database
        finally:
            database.close()


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """The application behind uvicorn on a loopback port."""
    port = free_port()
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "uvicorn did not start"
            thread.join(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def running(postgres_server: PostgresServer, tmp_path: Path) -> Iterator[Running]:
    """The service on real PostgreSQL, with something in it."""
    measured = telemetry.build("keysvc-test")
    with postgres_database(postgres_server) as database:
        service = Service(database, LocalWrapper(os.urandom(32)), LIMITS, utc_now, os.urandom)
        tokens.ensure_signing_key(service)
        key = tmp_path / "platform.key"
        homes.create_platform_key(key, os.urandom)
        homes.register_platform_key(service, key)
        # Names of webhooks lead to one public address; nothing is sent there.
        guard = Guard(lambda _host, _port: ["192.0.2.7"], allow=(ip_network("192.0.2.0/24"),))
        with serving(build_app(service, measured, webhook_guard=guard)) as url:
            made = Running(url, key.read_text())
            settle(made)
            yield made
    measured.shutdown()


def settle(running: Running) -> None:
    """A tenant ``acme`` with a model whose versions are COMPROMISED, DRAINING, ACTIVE and STAGED."""
    running.call("/v1/tenants", {"id": "acme"})
    running.call("/v1/tenants/acme/models", MODEL, running.admin("acme"))
    keys = "/v1/tenants/acme/models/chat/keys"
    for version in range(1, 5):
        running.call(f"{keys}:rotate")
        grant = running.grant("acme", "chat", version)
        running.call(f"{keys}/{version}:release", {"purpose": "materialize"}, grant)
        running.call(f"{keys}/{version}:stage", ARTIFACT, grant)
        if version < 4:
            running.call(f"{keys}/{version}:activate", {"endpoint": "http://engine"})
    assert running.call(f"{keys}/1:revoke", token=running.admin("acme"))


def run(running: Running, examples: int, outcome: Outcome, **more: Any) -> None:
    """Ask whatever schemathesis finds worth asking; ``more`` is of its configuration."""
    options = {
        "seed": SEED,
        "checks": CHECKS,
        "continue-on-failure": True,
        "generation": {"max-examples": examples, "database": "none"},
    }
    config = schemathesis.Config.from_dict({**options, **more})
    contract = schemathesis.openapi.from_url(f"{running.url}/openapi.json", config=config)
    contract.auth.providers.append(Bearer(running))
    contract.hook("map_path_parameters")(_existing)
    for event in from_schema(contract).execute():
        outcome.hear(event)


def _existing(_context: Any, path: Any) -> Any:
    """Of all the numbers that a version may have, ask for those that are there."""
    version = (path or {}).get("version")
    return {**path, "version": 1 + version % 5} if type(version) is int and version >= 1 else path


def test_the_reference_page_is_the_contracts() -> None:
    """docs/api.md says what the routes do: after a change, run what it names on its top."""
    assert PAGE.read_text() == reference.page(describe())


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(1800)
# Schemathesis' own.
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")
def test_every_answer_is_in_the_contract(running: Running) -> None:
    """No server error, no undocumented status, type, schema or header; no call without its credential."""
    outcome = Outcome()
    # Coverage of each parameter, examples good and bad, of tenants that mostly do not exist.
    run(running, EXAMPLES, outcome, phases=WITHOUT_STATES)
    # The tenant and model that do, so that versions go through their lives; then along the links.
    run(running, EXAMPLES, outcome, phases=WITHOUT_COVERAGE, parameters={"tenant": "acme", "model": "chat"})
    run(running, EXAMPLES * 5, outcome, phases=ONLY_STATES)
    print(outcome.report())  # noqa: T201 -- the figures of a long run
    assert not outcome.failures, "\n\n".join(f"{name}\n{text}" for name, text in outcome.failures.items())
    assert {"ignored_auth", "use_after_free", "status_code_conformance"} <= set(outcome.checks)
    assert outcome.stateful > 0
    assert len(outcome.reached) > 30, sorted(outcome.reached)
