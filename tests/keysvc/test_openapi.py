"""The running service keeps the contract that it publishes: schemathesis against uvicorn and PostgreSQL.

``ANAMORPH_CONTRACT_EXAMPLES=100`` makes the run longer (examples per operation and of stateful
scenarios; 8 by default), ``ANAMORPH_CONTRACT_SEED`` another one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from schemathesis.engine import from_schema
from sqlalchemy import create_engine
from starlette.types import ASGIApp, Receive, Scope, Send
from tests.keysvc.contract_run import Bearer, Outcome, Running
from tests.servers.asgi import serving
from tests.servers.postgres import PostgresServer

from anamorph import telemetry
from anamorph_keysvc import homes, reference, roles, schema
from anamorph_keysvc.app import build_app, describe
from anamorph_keysvc.database import Database
from anamorph_keysvc.service import tokens
from anamorph_keysvc.service.work import Service, utc_now
from anamorph_keysvc.settings import Limits
from anamorph_keysvc.webhooks.guard import Guard
from anamorph_keysvc.wrapper import LocalWrapper

# Schemathesis' own.
pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")
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
# Must have been asked of a webhook that the scenario had deleted.
READ = "GET /v1/tenants/{tenant}/webhooks/{webhook}"
NO_LIMIT = 10_000_000
LIMITS = Limits(
    reads_per_minute=NO_LIMIT,
    writes_per_minute=NO_LIMIT,
    releases_per_minute=NO_LIMIT,
    rotations_per_minute=NO_LIMIT,
    failed_logins_per_minute=NO_LIMIT,
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
def running_service(
    postgres_server: PostgresServer, folder: Path, before: Callable[[ASGIApp], ASGIApp]
) -> Iterator[Running]:
    """The service on real PostgreSQL, with something in it; ``before`` may stand in its way."""
    measured = telemetry.build("keysvc-test")
    with postgres_database(postgres_server) as database:
        service = Service(database, LocalWrapper(os.urandom(32)), LIMITS, utc_now, os.urandom)
        tokens.ensure_signing_key(service)
        key = folder / "platform.key"
        homes.create_platform_key(key, os.urandom)
        homes.register_platform_key(service, key)
        # Names of webhooks lead to one public address; nothing is sent there.
        guard = Guard(lambda _host, _port: ["192.0.2.7"], allow=(ip_network("192.0.2.0/24"),))
        with serving(before(build_app(service, measured, webhook_guard=guard))) as url:
            made = Running(url, key.read_text())
            settle(made)
            yield made
    measured.shutdown()


@pytest.fixture
def running(postgres_server: PostgresServer, tmp_path: Path) -> Iterator[Running]:
    with running_service(postgres_server, tmp_path, lambda app: app) as running:
        yield running


def keeps_what_is_deleted(app: ASGIApp) -> ASGIApp:
    """The service, but a DELETE is only a GET: it answers as it should, and nothing is gone."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        deletes = scope["type"] == "http" and scope["method"] == "DELETE" and "/webhooks/" in scope["path"]
        await app({**scope, "method": "GET"} if deletes else scope, receive, send)

    return answer


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


def run(running: Running, examples: int, outcome: Outcome, *, only: str | None = None, **more: Any) -> None:
    """Ask whatever schemathesis finds worth asking; ``more`` is of its configuration.

    ``only`` is a tag: operations without it are left out.
    """
    options = {
        "seed": SEED,
        "checks": CHECKS,
        "continue-on-failure": True,
        "generation": {"max-examples": examples, "database": "none"},
        # Of a busy machine, not of the service.
        "suppress-health-check": ["too_slow"],
    }
    config = schemathesis.Config.from_dict({**options, **more})
    whole = schemathesis.openapi.from_url(f"{running.url}/openapi.json", config=config)
    contract = whole.include(tag=only) if only else whole
    contract.auth.providers.append(Bearer(running))
    contract.hook("map_path_parameters")(_existing)
    contract.hook("map_body")(_admitted)
    for event in from_schema(contract).execute():
        outcome.hear(event)


def _existing(_context: Any, path: Any) -> Any:
    """Of all the numbers that a version may have, ask for those that are there."""
    version = (path or {}).get("version")
    return {**path, "version": 1 + version % 5} if type(version) is int and version >= 1 else path


def _admitted(_context: Any, body: Any) -> Any:
    """Of all the addresses that a webhook may have, half are such as are taken: text alone hardly ever is."""
    url = body.get("url") if isinstance(body, dict) else None
    good = isinstance(url, str) and 1 <= len(url) <= 2000 and len(url) % 2
    return {**body, "url": "https://hooks.example.com/anamorph"} if good else body


def run_webhooks(running: Running, outcome: Outcome) -> None:
    """Webhooks alone, so that some are created, deleted and then read."""
    run(running, EXAMPLES * 5, outcome, only="webhooks", phases=ONLY_STATES, parameters={"tenant": "acme"})


def test_the_reference_page_is_the_contracts() -> None:
    """docs/api.md says what the routes do: after a change, run what it names on its top."""
    assert PAGE.read_text() == reference.page(describe())


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_answer_is_in_the_contract(running: Running) -> None:
    """No server error, no undocumented status, type, schema or header; no call without its credential."""
    outcome = Outcome()
    # Coverage of each parameter, examples good and bad, of tenants that mostly do not exist.
    run(running, EXAMPLES, outcome, phases=WITHOUT_STATES)
    # The tenant and model that do, so that versions go through their lives; then along the links.
    run(running, EXAMPLES, outcome, phases=WITHOUT_COVERAGE, parameters={"tenant": "acme", "model": "chat"})
    run(running, EXAMPLES * 5, outcome, phases=ONLY_STATES)
    run_webhooks(running, outcome)
    print(outcome.report())  # noqa: T201 -- the figures of a long run
    assert not outcome.failures, "\n\n".join(f"{name}\n{text}" for name, text in outcome.failures.items())
    assert {"ignored_auth", "use_after_free", "status_code_conformance"} <= set(outcome.checks)
    assert outcome.stateful > 0
    assert outcome.freed[READ] > 0, outcome.freed
    assert len(outcome.reached) > 30, sorted(outcome.reached)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_deletion_that_deletes_nothing_is_found(postgres_server: PostgresServer, tmp_path: Path) -> None:
    """What shows that ``use_after_free`` looks: the same run finds a service that keeps its webhooks."""
    outcome = Outcome()
    with running_service(postgres_server, tmp_path, keeps_what_is_deleted) as running:
        run_webhooks(running, outcome)
    assert "use_after_free" in {name.partition(" ")[0] for name in outcome.failures}
