"""The service as it runs in production: real PostgreSQL, real Vault, two processes."""

from __future__ import annotations

import base64
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from anamorph.wire.admin import (
    Activation,
    ApiKeyCreate,
    BackupCreate,
    Materialized,
    ModelCreate,
    Probe,
    Role,
    RotationPolicy,
    TenantCreate,
)
from anamorph.wire.keyservice import KeyService, everything
from anamorph.wire.states import State

if TYPE_CHECKING:
    from tests.servers.production import KeyServiceProcess, Production

pytestmark = [pytest.mark.real, pytest.mark.slow]

AT = ("acme", "chat")
ARTIFACT = Materialized(replica="r", manifest_sha256="0" * 64, probe=Probe(prompts=((1,),), expected=((2,),)))
POLICY = RotationPolicy(
    grace_s=4, client_cache_ttl_s=1, longest_request_s=1, clock_skew_s=1, propagation_s=1, destroy_delay_s=0
)


def admin_of(production: Production, process: KeyServiceProcess) -> KeyService:
    """A new tenant with its model; its administrator's calls."""
    with production.platform(process) as platform:
        platform.create_tenant(TenantCreate(id="acme"))
        secret = platform.create_api_key("acme", ApiKeyCreate(name="test", role=Role.ADMIN)).secret
    keys = KeyService(process.url, secret)
    keys.create_model(
        "acme", ModelCreate(id="chat", base="b", vocab_size=50, context_length=64, policy=POLICY)
    )
    return keys


def make_active(production: Production, process: KeyServiceProcess, version: int) -> bytes:
    """Take a version through materialisation into service; the root that its job read."""
    with production.platform(process) as platform:
        grant = platform.materialize(*AT, version)
        with KeyService(process.url, grant.secret) as job:
            root = job.release(*AT, version, "materialize").material()
            job.stage(*AT, version, ARTIFACT)
        platform.activate(*AT, version, Activation(endpoint="http://e"))
    return root


def test_a_key_lives_and_dies_in_production(production: Production) -> None:
    """From issue to shredding, by two processes over one database; the root stays out of both logs."""
    first, second = production.process("first"), production.process("second")
    roots = []
    with admin_of(production, first) as admin, production.platform(second) as platform:
        for version in (1, 2):
            operation = admin.rotate(*AT)
            assert (operation.version, operation.status) == (version, "running")
            roots.append(make_active(production, second, version))
        with KeyService(second.url, platform.create_api_key("acme", _client()).secret) as client:
            assert client.release(*AT, 2, "client").material() != roots[1]
        until(lambda: platform.get_version(*AT, 1).state is State.DRAINING)
        time.sleep(POLICY.grace_s)
        platform.retire(*AT, 1)
        admin.destroy(*AT, 1)
        assert platform.destroyed(*AT, 1).destroy_complete_after is not None
        shredding = [one for one in everything(admin.list_operations, "acme") if one.kind == "shred"]
        until(lambda: admin.get_operation("acme", shredding[0].id).phase == "await-backup")
        # An old backup does not do: what it holds must have been rewrapped before.
        platform.record_backup(BackupCreate(taken_at=datetime.now(UTC) - timedelta(days=1)))
        assert admin.get_operation("acme", shredding[0].id).phase == "await-backup"
        dump = dumped(production)
        platform.record_backup(BackupCreate(taken_at=datetime.now(UTC)))
        until(lambda: admin.get_operation("acme", shredding[0].id).status == "succeeded", 90)
        gone = platform.get_version(*AT, 1)
        assert gone.state is State.DESTROYED
        assert gone.destroy_complete_after is not None
        assert gone.destroy_complete_after < datetime.now(UTC) + timedelta(hours=1)
        # What lives is as good as before; nothing of it is in what left the service.
        with KeyService(first.url, platform.create_api_key("acme", _client()).secret) as client:
            client.release(*AT, 2, "client")
    _nowhere(production, roots, dump)


def dumped(production: Production) -> bytes:
    """A backup of the database."""
    made = subprocess.run(
        [production.postgres.tool("pg_dump"), production.url("anamorph_backup")],
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert b"COPY public.key_version" in made.stdout
    return made.stdout


def _client() -> ApiKeyCreate:
    return ApiKeyCreate(name="client", role=Role.CLIENT)


def until(happened: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for something that the service does by itself."""
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        if happened():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")


def _nowhere(production: Production, roots: list[bytes], dump: bytes) -> None:
    places = [*production.folder.glob("*.log"), production.vault.audit_log, production.vault.log]
    for root in roots:
        for form in (root, root.hex().encode(), base64.b64encode(root)):
            assert form not in dump
            for place in places:
                assert form not in place.read_bytes(), place
