"""How long calls take with 10,000 tenants of 10 key versions each in PostgreSQL.

    python benchmarks/keysvc_scale.py [--vault] [--tenants 10000] [--calls 400] [--explain] [--json FILE]

The rows are inserted through the database's own triggers, every version through all its
states, each tenant with a hash chain of audit rows and an API key. Calls go over HTTP,
one after the other, each of a random tenant as that tenant, in random order of kinds;
the scan for due rotations runs as the worker runs it. The server, its database and the
asking client share this machine. A query that reads a large table as a whole is named.
Keys are wrapped by the local wrapper, or with --vault by a real Vault on the same machine,
which a rotation then waits for: it makes the tenant's KEK and wraps the root.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import random
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import uvicorn
from sqlalchemy import create_engine, event

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.keysvc_release import summary  # noqa: E402 -- the checkout, not a package
from tests.servers.postgres import PostgresServer, running_postgres  # noqa: E402 -- as above
from tests.servers.process import free_port  # noqa: E402 -- as above
from tests.servers.production import running_production  # noqa: E402 -- as above
from tests.servers.vault import running_vault  # noqa: E402 -- as above

from anamorph import telemetry  # noqa: E402 -- as above
from anamorph.cli.machine.signals import end_as_interrupt  # noqa: E402 -- as above
from anamorph.wire import audit as chain  # noqa: E402 -- as above
from anamorph.wire.admin import RotationPolicy  # noqa: E402 -- as above
from anamorph_keysvc import config, homes, roles, schema  # noqa: E402 -- as above
from anamorph_keysvc.app import build_app  # noqa: E402 -- as above
from anamorph_keysvc.database import Database  # noqa: E402 -- as above
from anamorph_keysvc.scope import WORKER  # noqa: E402 -- as above
from anamorph_keysvc.service import tokens, usage  # noqa: E402 -- as above
from anamorph_keysvc.service.work import Service, utc_now  # noqa: E402 -- as above
from anamorph_keysvc.settings import Limits  # noqa: E402 -- as above
from anamorph_keysvc.vault.auth import Vault  # noqa: E402 -- as above
from anamorph_keysvc.vault.wrapper import VaultTransitWrapper  # noqa: E402 -- as above
from anamorph_keysvc.wrapper import KeyWrapper, LocalWrapper  # noqa: E402 -- as above

TARGET_MS = 50.0
VERSIONS = 10
DUE = 50
LARGE = 1000
_NO_LIMIT = 10_000_000
START = datetime(2026, 1, 1, tzinfo=UTC)

# Set-based, version by version, so that every row passes the triggers in every state.
_FIRST = """
INSERT INTO key_version (tenant, model, version, state, row_version, created_at, updated_at, served_tokens,
    key_id, kcv, vocab_kcv, public_key, ciphertext, kek_version)
SELECT tenant, id, %(v)s, 'PENDING', 1, %(at)s, %(at)s, 0, tenant || '.' || id || '.v%(v)s.' || kcv, kcv, kcv,
    'AAAA', decode(repeat('ab', 60), 'hex'), 1
FROM model, LATERAL (SELECT left(md5(tenant || '%(v)s'), 16) AS kcv) AS drawn
"""
_MOVE = "UPDATE key_version SET state = %(to)s, row_version = row_version + 1, {0} WHERE state = %(of)s"
_SERVED = "endpoint = 'http://engine', activated_at = %(at)s, rotate_at = %(rotate_at)s"
_ARTIFACT = (
    '{"replica": "r", "manifest_sha256": "' + "0" * 64 + '", "probe": {"prompts": [], "expected": []}}'
)
_STEPS = (
    ("PENDING", "MATERIALIZING", "updated_at = %(at)s"),
    ("MATERIALIZING", "STAGED", f"artifact = '{_ARTIFACT}'"),
    ("ACTIVE", "DRAINING", "drain_until = %(at)s"),
    ("DRAINING", "RETIRED", "updated_at = %(at)s"),
    ("STAGED", "ACTIVE", _SERVED),
)
_OPERATIONS = """
INSERT INTO operation
    (id, kind, tenant, model, version, status, phase, progress, created_at, updated_at, attempts)
SELECT 'op_' || md5(tenant || version), 'rotate', tenant, model, version, 'succeeded', 'succeeded', 1,
    created_at, created_at, 0
FROM key_version
"""


def secret_of(tenant: str) -> str:
    """A tenant's API key."""
    return f"amk_{hashlib.sha256(tenant.encode()).hexdigest()[:43]}"


def fill(connection: psycopg.Connection[Any], tenants: int) -> None:
    """Tenants with one model and ten versions each, the last ACTIVE, as the owner of the tables."""
    names = [f"t{number:05d}" for number in range(tenants)]
    policy = RotationPolicy().model_dump_json()
    with connection.cursor() as cursor:
        _copy(
            cursor,
            "tenant (id, display_name, kek, quota, created_at)",
            ((name, name, f"t-{name}", "{}", START) for name in names),
        )
        _copy(
            cursor,
            "model (tenant, id, base, profile, engine, dtype, vocab_size, context_length, policy,"
            " last_version, created_at)",
            ((n, "chat", "b", "rotate", "torch", "auto", 50, 64, policy, VERSIONS, START) for n in names),
        )
        _copy(
            cursor,
            "api_key (id, tenant, name, role, hash, created_at)",
            (
                (f"key_{n}", n, "bench", "admin", hashlib.sha256(secret_of(n).encode()).hexdigest(), START)
                for n in names
            ),
        )
        for version in range(1, VERSIONS + 1):
            at = START + timedelta(days=version)
            cursor.execute((_FIRST.replace("%(v)s", str(version))), {"at": at})
            for of, to, more in _STEPS:
                cursor.execute(
                    _MOVE.format(more),
                    {"of": of, "to": to, "at": at, "rotate_at": utc_now() + timedelta(days=30)},
                )
        cursor.execute(_OPERATIONS)
        _copy(
            cursor,
            "audit (tenant, sequence, at, actor, action, subject, detail, previous, digest)",
            _audit(names),
        )
        # Some rotations are due.
        cursor.execute(
            "UPDATE key_version SET rotate_at = %s, row_version = row_version + 1"
            " WHERE state = 'ACTIVE' AND tenant < %s",
            (utc_now(), f"t{DUE:05d}"),
        )
    connection.commit()


def _copy(cursor: psycopg.Cursor[Any], into: str, rows: Iterator[tuple[Any, ...]]) -> None:
    with cursor.copy(f"COPY {into} FROM STDIN") as copy:
        for row in rows:
            copy.write_row(row)


def _audit(names: list[str]) -> Iterator[tuple[Any, ...]]:
    """A true chain per tenant, one row per version."""
    for name in names:
        head = chain.START
        for version in range(1, VERSIONS + 1):
            row = chain.next_row(
                head,
                tenant=name,
                at=START,
                actor="bench",
                action="rotate",
                subject=f"chat/{version}",
                detail={"state": "PENDING"},
            )
            head = chain.checkpoint_of(row)
            yield (
                name,
                row.sequence,
                row.at,
                row.actor,
                row.action,
                row.subject,
                json.dumps(row.detail),
                row.previous,
                row.digest,
            )


@dataclass
class Filled:
    """The service over a filled database, with what it asked of it."""

    server: PostgresServer
    database: str
    service: Service
    url: str
    tenants: int
    statements: dict[str, Any] = field(default_factory=dict)

    def note(self, *call: Any) -> None:
        """Keep a statement with its parameters; the signature is SQLAlchemy's before_cursor_execute."""
        if call[2].lstrip().startswith(("SELECT", "UPDATE")):
            self.statements.setdefault(call[2], call[3])


def on_vault(ends: ExitStack, server: PostgresServer, folder: Path) -> KeyWrapper:
    """A real Vault, set up and logged into as the production service does."""
    for name in ("vault", "production"):
        (folder / name).mkdir()
    vault = ends.enter_context(running_vault(folder / "vault"))
    made = ends.enter_context(running_production(folder / "production", server, vault))
    opened = Vault.open(config.load(made.config("scale")).vault)
    ends.callback(opened.close)
    return VaultTransitWrapper(opened)


@contextmanager
def filled(server: PostgresServer, tenants: int, folder: Path, wrapper: KeyWrapper) -> Iterator[Filled]:
    """The service on a fresh database with that many tenants."""
    with ExitStack() as ends:
        name = ends.enter_context(server.fresh())
        engine = create_engine(server.url(name))
        with engine.begin() as connection:
            roles.setup(connection)
        engine.dispose()
        engine = create_engine(server.url(name, roles.MIGRATOR))
        schema.upgrade(engine)
        engine.dispose()
        began = time.perf_counter()
        with psycopg.connect(server.dsn(name, roles.MIGRATOR)) as connection:
            fill(connection, tenants)
        with server.admin(name) as admin:
            admin.execute("VACUUM ANALYZE")
        print(f"{tenants} tenants inserted in {time.perf_counter() - began:.0f} s")
        database = Database.postgresql(server.dsn(name, roles.SERVICE))
        ends.callback(database.close)
        limits = Limits(
            reads_per_minute=_NO_LIMIT, writes_per_minute=_NO_LIMIT, rotations_per_minute=_NO_LIMIT
        )
        service = Service(database, wrapper, limits, utc_now, os.urandom)
        tokens.ensure_signing_key(service)
        homes.create_platform_key(folder / "platform.key", os.urandom)
        homes.register_platform_key(service, folder / "platform.key")
        measured = telemetry.build("bench")
        ends.callback(measured.shutdown)
        # Without background work: it would begin the rotations that the scan is to find.
        url = ends.enter_context(serving(build_app(service, measured, jobs=())))
        yield Filled(server, name, service, url, tenants)


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """The application behind uvicorn on a loopback port, in a thread that works while the caller waits."""
    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_config=None, access_log=False)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            thread.join(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def measure(place: Filled, platform: str, calls: int) -> dict[str, Any]:
    """Every kind of call in turn, the kinds in a new order each time; rotations of different tenants."""
    source = random.Random(0)  # noqa: S311 -- choice of tenants, not secrecy
    fresh = iter(source.sample(range(DUE, place.tenants), min(calls + 1, place.tenants - DUE)))
    taken: dict[str, list[float]] = {}
    with httpx.Client(base_url=place.url, trust_env=False, timeout=30) as http:

        def ask(method: str, path: str, tenant: str | None = None) -> None:
            token = platform if tenant is None else secret_of(tenant)
            answer = http.request(method, path, headers={"Authorization": f"Bearer {token}"})
            assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"

        kinds: dict[str, Callable[[str], None]] = {
            "list versions": lambda t: ask("GET", f"/v1/tenants/{t}/models/chat/keys", t),
            "get version": lambda t: ask("GET", f"/v1/tenants/{t}/models/chat/keys/10", t),
            "list operations": lambda t: ask("GET", f"/v1/tenants/{t}/operations", t),
            "list API keys": lambda t: ask("GET", f"/v1/tenants/{t}/api-keys", t),
            "read audit": lambda t: ask("GET", f"/v1/tenants/{t}/audit", t),
            "list all tenants": lambda t: ask("GET", f"/v1/tenants?page={token_of(t)}"),
            "list all ACTIVE": lambda t: ask(
                "GET", f"/v1/versions?state=ACTIVE&page={token_of(t, 'chat', 1)}"
            ),
            "scan due rotations": lambda _: scan(place.service),
            "rotate": lambda _: (lambda t: ask("POST", f"/v1/tenants/{t}/models/chat/keys:rotate", t))(
                f"t{next(fresh):05d}"
            ),
        }
        for number in range(calls):
            for kind in source.sample(sorted(kinds), len(kinds)):
                tenant = f"t{source.randrange(place.tenants):05d}"
                began = time.perf_counter()
                kinds[kind](tenant)
                if number:
                    taken.setdefault(kind, []).append(time.perf_counter() - began)
    return {kind: summary(seconds) for kind, seconds in sorted(taken.items())}


def token_of(*place: str | int) -> str:
    """The token of the page after a place in a list, as the service makes them."""
    return base64.urlsafe_b64encode(json.dumps(list(place)).encode()).decode()


def scan(service: Service) -> None:
    """What the worker does every few seconds."""
    with service.database.read(WORKER) as session:
        due = usage.due_rotations(session, service.clock(), timedelta(seconds=600))
    assert len(due) == DUE, f"{len(due)} rotations are due"


def plans(place: Filled) -> dict[str, list[str]]:
    """PostgreSQL's plan of every statement that was noted; row security only adds conditions to it."""
    with place.server.admin(place.database) as admin:
        return {
            statement: [str(row[0]) for row in admin.execute(f"EXPLAIN {statement}", parameters)]
            for statement, parameters in place.statements.items()
        }


def whole_reads(found: dict[str, list[str]]) -> list[str]:
    """Statements that read a table of many rows from end to end."""
    pattern = re.compile(r"Seq Scan on (\w+).*rows=(\d+)")
    return [
        f"{match[1]}: {' '.join(statement.split())[:300]}"
        for statement, plan in found.items()
        for match in pattern.finditer("\n".join(plan))
        if int(match[2]) >= LARGE
    ]


def main() -> None:
    """Fill, measure, explain, print."""
    end_as_interrupt()
    parser = argparse.ArgumentParser(description="Latency of calls with many tenants in the database.")
    parser.add_argument("--vault", action="store_true", help="wrap by Vault; fail where it is missing")
    parser.add_argument("--tenants", type=int, default=10_000)
    parser.add_argument("--calls", type=int, default=400, help="calls of each kind")
    parser.add_argument("--explain", action="store_true", help="print the plan of every statement")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory()))
        try:
            server = ends.enter_context(running_postgres())
            local = LocalWrapper(os.urandom(32))
            wrapper = on_vault(ends, server, folder) if options.vault else local
        except pytest.skip.Exception as missing:
            if options.vault:
                raise SystemExit(str(missing)) from None
            print(missing)
            return
        place = ends.enter_context(filled(server, options.tenants, folder, wrapper))
        event.listen(place.service.database.engine, "before_cursor_execute", place.note)
        result: dict[str, Any] = measure(place, (folder / "platform.key").read_text(), options.calls)
        found = plans(place)
    for kind in result.values():
        kind["target_p99_ms"], kind["met"] = TARGET_MS, kind["p99_ms"] <= TARGET_MS
    result["on"] = f"PostgreSQL, {'Vault' if options.vault else 'local wrapper'}"
    result["read as a whole"] = whole_reads(found)
    print(json.dumps(result, indent=2))
    if options.explain:
        print("\n\n".join("\n".join([statement, *plan]) for statement, plan in found.items()))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
